//! How a command proves to a coordinator who asks.

use std::{fmt, path::PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use fairlead_common::{
    text,
    tls::{Tls, TlsArgs},
};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::Interceptor,
};

/// Variable that holds a key itself; on the command line others could read it.
const KEY: &str = "FAIRLEAD_KEY";

/// Options of every command that takes --server.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Access to --server")]
pub(crate) struct CredentialArgs {
    /// File with your tenant's key, as `fairlead keys client` writes it; or set FAIRLEAD_KEY to the key.
    #[arg(long, value_name = "FILE", env = "FAIRLEAD_KEY_FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    tls: TlsArgs,
}

impl CredentialArgs {
    /// Reads the files.
    pub(crate) fn load(&self) -> Result<Credentials> {
        let key = match &self.key_file {
            Some(path) => {
                let text = text::read(path)
                    .with_context(|| format!("--key-file: cannot read {}", path.display()))?;
                Some(text)
            }
            None => std::env::var(KEY).ok(),
        };
        let key = key.map(|key| Key::new(key.trim())).transpose()?;
        Ok(Credentials { key: key.unwrap_or_default(), tls: self.tls.load()? })
    }
}

/// A key, certificates, both or neither.
#[derive(Clone, Default)]
pub(crate) struct Credentials {
    pub(crate) key: Key,
    pub(crate) tls: Tls,
}

/// Adds `authorization: Bearer KEY` to calls where there is a key.
#[derive(Clone, Default)]
pub(crate) struct Key(Option<MetadataValue<Ascii>>);

impl Key {
    /// The key of a tenant. It is shown in no log and no message.
    pub(crate) fn new(key: &str) -> Result<Self> {
        if key.is_empty() || !key.chars().all(|c| c.is_ascii_graphic()) {
            bail!("the key is empty or holds other characters than `fairlead keys client` writes");
        }
        let mut header = MetadataValue::try_from(format!("Bearer {key}"))?;
        header.set_sensitive(true);
        Ok(Self(Some(header)))
    }

    /// Whether there is one.
    pub(crate) fn is_set(&self) -> bool {
        self.0.is_some()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_set() { "Key(..)" } else { "Key(none)" })
    }
}

impl Interceptor for Key {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(header) = &self.0 {
            request.metadata_mut().insert("authorization", header.clone());
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_travels_and_is_not_shown() {
        let mut key = Key::new("hunter2").expect("it is printable");
        let request = key.call(Request::new(())).expect("nothing refuses");
        let header = request.metadata().get("authorization").expect("it was added");
        assert_eq!(header.as_encoded_bytes(), b"Bearer hunter2");
        for shown in [format!("{key:?}"), format!("{:?}", request.metadata())] {
            assert!(!shown.contains("hunter2"), "{shown}");
        }
        let none = Key::default().call(Request::new(())).expect("nothing refuses");
        assert!(none.metadata().get("authorization").is_none());
        for wrong in ["", "two words", "line\nbreak"] {
            assert!(Key::new(wrong).is_err(), "{wrong}");
        }
    }
}
