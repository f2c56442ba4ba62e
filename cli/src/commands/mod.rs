//! One file a command.

pub(crate) mod calibrate;
pub(crate) mod concepts;
pub(crate) mod demo;
pub(crate) mod evaluate;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod keys;
pub(crate) mod services;
pub(crate) mod up;
pub(crate) mod verify;
