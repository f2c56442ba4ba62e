//! What the tests of layers and of networks share.
#![allow(clippy::expect_used, reason = "helpers of tests panic as tests do")]

use std::sync::LazyLock;

use candle_core::Device;
use fairlead_models::DeviceName;

/// The device under test: the CPU, or with `--features cuda` the one that `FAIRLEAD_TEST_DEVICE` names, such as cuda:0.
pub(crate) fn device() -> Device {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| {
        let name = std::env::var("FAIRLEAD_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
        let name: DeviceName = name.parse().expect("FAIRLEAD_TEST_DEVICE names a device");
        name.open().expect("the device of FAIRLEAD_TEST_DEVICE")
    });
    DEVICE.clone()
}
