//! The names of devices, as options and environment say them.

use std::{fmt, str::FromStr};

use candle_core::Device;

use crate::error::{Error, Result};

/// Where networks run: "cpu", "cuda" (the first GPU) or "cuda:N".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceName {
    /// The CPU, with this project's own kernels.
    #[default]
    Cpu,
    /// A CUDA device by ordinal.
    Cuda(usize),
}

impl DeviceName {
    /// Opens the device. Every call makes another handle, and tensors of two handles do not mix: open it once
    /// and clone it.
    ///
    /// # Errors
    /// [`Error::Device`] if the build or the machine has none of this name.
    pub fn open(self) -> Result<Device> {
        let Self::Cuda(ordinal) = self else { return Ok(Device::Cpu) };
        let refused = |why| Error::Device { device: self, why };
        if !cfg!(feature = "cuda") {
            return Err(refused("this build has no CUDA; build with `--features cuda`".to_owned()));
        }
        Device::new_cuda(ordinal).map_err(|error| refused(error.to_string()))
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            other => {
                other.strip_prefix("cuda:").and_then(|number| number.parse().ok()).map(Self::Cuda)
            }
        }
        .ok_or_else(|| format!("device `{text}` is not one of: cpu, cuda, cuda:N"))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (text, device) in [
            ("cpu", DeviceName::Cpu),
            ("cuda:0", DeviceName::Cuda(0)),
            ("cuda:3", DeviceName::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceName::Cuda(0)));
        for text in ["gpu", "cuda:x", "cuda:", "cpu:0", ""] {
            let error = text.parse::<DeviceName>().expect_err("refused");
            assert!(error.contains(&format!("`{text}`")) && error.contains("cuda:N"), "{error}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_with_its_name() {
        assert!(matches!(DeviceName::Cpu.open(), Ok(Device::Cpu)));
        let error = DeviceName::Cuda(4096).open().expect_err("no machine has so many").to_string();
        assert!(error.contains("device cuda:4096: "), "{error}");
    }
}
