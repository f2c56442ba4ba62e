//! Signatures of safety records: Ed25519 (RFC 8032) over the record as protobuf encodes it, with its fields
//! in the order of their numbers and without the signature itself.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use ed25519_dalek::{
    Signature, Signer as _, SigningKey, VerifyingKey,
    pkcs8::{
        DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey,
        spki::der::pem::LineEnding,
    },
};
use fairlead_proto::v1::{RecordSignature, SafetyRecord};
use prost::Message;
use sha2::{Digest, Sha256};

use crate::text;

/// Begins what is signed: no signature of something else is one of a record.
const CONTEXT: &[u8] = b"fairlead.v1.SafetyRecord\0";

/// A key file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// It holds something else.
    #[error("{path} holds no Ed25519 {what} in PEM form; `fairlead keys signing` makes one")]
    Pem {
        /// The file.
        path: PathBuf,
        /// "private key" or "public key".
        what: &'static str,
    },
    /// A public key whose private key is gone.
    #[error(
        "{public} is there and its private key {private} is not: records that it signed would be believed \
         no longer. Put the private key back; or move {public} away, name it with --trusted-signer, and \
         start again with a new pair"
    )]
    Widowed {
        /// Where the private key should be.
        private: PathBuf,
        /// The public key.
        public: PathBuf,
    },
    /// Keys of different pairs.
    #[error("{public} is not the public key of {private}; put the right one back or move it away")]
    NoPair {
        /// The private key.
        private: PathBuf,
        /// The public key.
        public: PathBuf,
    },
}

/// Why a record is not believed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SignatureError {
    /// There is nothing to check.
    #[error("the record is not signed")]
    Missing,
    /// Somebody else signed it.
    #[error("the record is signed with key {0}, which is none of the keys that are trusted here")]
    Unknown(String),
    /// The record is not the one that was signed.
    #[error("the signature does not fit the record: it was changed after it was signed")]
    Wrong,
}

/// Signs records; clones share the key.
#[derive(Clone)]
pub struct Signer {
    key: Arc<SigningKey>,
    id: String,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Signer({})", self.id)
    }
}

impl Signer {
    /// A key that nobody has had before.
    pub fn generate() -> Self {
        Self::new(SigningKey::from_bytes(&rand::random()))
    }

    fn new(key: SigningKey) -> Self {
        let id = key_id(&key.verifying_key());
        Self { key: Arc::new(key), id }
    }

    /// The key in `path`, PKCS #8 in PEM form.
    ///
    /// # Errors
    /// If the file cannot be read or holds something else.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let text = read(path)?;
        let key = SigningKey::from_pkcs8_pem(&text)
            .map_err(|_| KeyError::Pem { path: path.to_owned(), what: "private key" })?;
        Ok(Self::new(key))
    }

    /// The key in `path`; where neither it nor its public key in `public` is there, a new pair is made, the
    /// private one readable by its owner alone. Of processes that do so at once all get the same key.
    ///
    /// # Errors
    /// If a file cannot be read or written, or holds something else; if there is only a public key, whose
    /// records a new key could not vouch for; or if both are there and are no pair.
    pub fn load_or_create(path: &Path, public: &Path) -> Result<Self, KeyError> {
        let known = public.exists().then(|| PublicKey::load(public)).transpose()?;
        if !path.exists() {
            if known.is_some() {
                let (private, public) = (path.to_owned(), public.to_owned());
                return Err(KeyError::Widowed { private, public });
            }
            Self::generate().save(path)?;
        }
        let signer = Self::load(path)?;
        match known {
            Some(known) if known != signer.public() => {
                Err(KeyError::NoPair { private: path.to_owned(), public: public.to_owned() })
            }
            Some(_) => Ok(signer),
            // A private key leads to its public one, so a pair that was cut short is made whole.
            None => {
                write(public, signer.public().to_pem().as_bytes(), 0o644)?;
                Ok(signer)
            }
        }
    }

    /// Puts the key into `path`, readable by its owner alone; a key that is there already stays.
    fn save(&self, path: &Path) -> Result<(), KeyError> {
        let pem = self.key.to_pkcs8_pem(LineEnding::LF).expect("a key in memory has a PEM form");
        write(path, pem.as_bytes(), 0o600)
    }

    /// A secret for another purpose than signatures, which the key alone leads to: processes with the same
    /// key have the same.
    pub fn derive(&self, purpose: &str) -> [u8; 32] {
        // The key is 32 random bytes at the end of the message, so a hash is a sound derivation.
        Sha256::new()
            .chain_update((purpose.len() as u64).to_le_bytes())
            .chain_update(purpose)
            .chain_update(self.key.to_bytes())
            .finalize()
            .into()
    }

    /// What others check its signatures with.
    pub fn public(&self) -> PublicKey {
        PublicKey { key: self.key.verifying_key(), id: self.id.clone() }
    }

    /// Signs a record, which must not change any more.
    pub fn sign(&self, record: &mut SafetyRecord) {
        let signature = self.key.sign(&signed_bytes(record));
        record.signature = Some(RecordSignature {
            key_id: self.id.clone(),
            ed25519: signature.to_bytes().to_vec(),
        });
    }
}

/// Checks signatures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    key: VerifyingKey,
    id: String,
}

impl PublicKey {
    /// The key in `path`, SubjectPublicKeyInfo in PEM form.
    ///
    /// # Errors
    /// If the file cannot be read or holds something else.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let text = read(path)?;
        let key = VerifyingKey::from_public_key_pem(&text)
            .map_err(|_| KeyError::Pem { path: path.to_owned(), what: "public key" })?;
        Ok(Self { key, id: key_id(&key) })
    }

    /// Its name in signatures: the first 16 hex digits of the key's SHA-256.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// SubjectPublicKeyInfo in PEM form.
    pub fn to_pem(&self) -> String {
        self.key.to_public_key_pem(LineEnding::LF).expect("a key in memory has a PEM form")
    }
}

/// The key among `trusted` that signed `record` as it is.
///
/// # Errors
/// If none did.
pub fn verify<'a>(
    record: &SafetyRecord,
    trusted: &'a [PublicKey],
) -> Result<&'a PublicKey, SignatureError> {
    let signature = record.signature.as_ref().ok_or(SignatureError::Missing)?;
    let key = trusted
        .iter()
        .find(|key| key.id == signature.key_id)
        .ok_or_else(|| SignatureError::Unknown(signature.key_id.clone()))?;
    let bytes = Signature::from_slice(&signature.ed25519).map_err(|_| SignatureError::Wrong)?;
    key.key.verify_strict(&signed_bytes(record), &bytes).map_err(|_| SignatureError::Wrong)?;
    Ok(key)
}

fn signed_bytes(record: &SafetyRecord) -> Vec<u8> {
    let unsigned = SafetyRecord { signature: None, ..record.clone() };
    [CONTEXT, &unsigned.encode_to_vec()].concat()
}

fn key_id(key: &VerifyingKey) -> String {
    Sha256::digest(key.as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn read(path: &Path) -> Result<String, KeyError> {
    text::read(path).map_err(|source| KeyError::Io { path: path.to_owned(), source })
}

/// Creates a file whole, unless there is one.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), KeyError> {
    let failed = |source| KeyError::Io { path: path.to_owned(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut file = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))
        .tempfile_in(folder.unwrap_or(Path::new(".")))
        .map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    match file.persist_noclobber(path) {
        Err(error) if error.error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(failed(error.error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled, spoiled_text};
    use fairlead_proto::v1::{ConceptScore, StepRecord, WorkerReport};

    fn record() -> SafetyRecord {
        SafetyRecord {
            record_id: "r".into(),
            seed: 7,
            image_sha256: "ab".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_signed_record_is_believed_until_anything_changes() {
        let signer = Signer::generate();
        let trusted = [Signer::generate().public(), signer.public()];
        let mut signed = record();
        assert_eq!(verify(&signed, &trusted), Err(SignatureError::Missing));
        signer.sign(&mut signed);
        assert_eq!(verify(&signed, &trusted).map(PublicKey::id), Ok(signer.public().id()));
        let json = crate::record::to_json(&signed);
        let read = crate::record::from_json(&json).expect("it is a record");
        assert!(verify(&read, &trusted).is_ok(), "through JSON");

        let changed = SafetyRecord { image_sha256: "cd".into(), ..signed.clone() };
        assert_eq!(verify(&changed, &trusted), Err(SignatureError::Wrong));
        let others = verify(&signed, &trusted[..1]);
        assert_eq!(others, Err(SignatureError::Unknown(signer.public().id().to_owned())));
        // Another's signature under this key's name.
        let mut forged = record();
        Signer::generate().sign(&mut forged);
        forged.signature.as_mut().expect("signed").key_id = signer.public().id().to_owned();
        assert_eq!(verify(&forged, &trusted), Err(SignatureError::Wrong));
        signed.signature.as_mut().expect("signed").ed25519.pop();
        assert_eq!(verify(&signed, &trusted), Err(SignatureError::Wrong));
    }

    /// RFC 8410, section 10: the private key's PEM, and the public key that belongs to it.
    #[test]
    fn keys_are_read_as_other_tools_write_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key.pem");
        std::fs::write(
            &path,
            "-----BEGIN PRIVATE KEY-----\n\
             MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
             -----END PRIVATE KEY-----\n",
        )
        .expect("it is written");
        let public = Signer::load(&path).expect("it is a key").public().to_pem();
        assert!(
            public.contains("MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE="),
            "{public}"
        );
    }

    #[test]
    fn derived_secrets_belong_to_a_key_and_a_purpose() {
        let (signer, other) = (Signer::generate(), Signer::generate());
        assert_eq!(signer.derive("crops"), signer.clone().derive("crops"));
        assert_ne!(signer.derive("crops"), signer.derive("other"));
        assert_ne!(signer.derive("crops"), other.derive("crops"));
    }

    #[test]
    fn a_key_is_made_once_and_kept_from_others() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let (path, public) = (folder.path().join("key.pem"), folder.path().join("public.pem"));
        let first = Signer::load_or_create(&path, &public).expect("it is made");
        let again = Signer::load_or_create(&path, &public).expect("it is read");
        assert_eq!(first.public(), again.public());
        assert_eq!(PublicKey::load(&public).expect("it is there"), first.public());
        let mode = std::fs::metadata(&path).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = Signer::load(&public).expect_err("it is the public one").to_string();
        assert!(error.contains("holds no Ed25519 private key"), "{error}");
    }

    #[test]
    fn keys_are_a_pair_or_nothing_starts() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, public) = (folder.path().join("key.pem"), folder.path().join("public.pem"));
        let first = Signer::load_or_create(&path, &public).expect("they are made");
        std::fs::remove_file(&public).expect("it was there");
        Signer::load_or_create(&path, &public).expect("the private key leads to it");
        assert_eq!(PublicKey::load(&public).expect("it is back"), first.public());
        let kept = std::fs::read(&path).expect("it is there");
        std::fs::remove_file(&path).expect("it was there");
        let error = Signer::load_or_create(&path, &public).expect_err("half a pair").to_string();
        assert!(error.contains("key.pem is not") && error.contains("--trusted-signer"), "{error}");
        assert!(!path.exists(), "no new key beside the old public one");
        Signer::generate().save(&path).expect("it is written");
        let error = Signer::load_or_create(&path, &public).expect_err("no pair").to_string();
        assert!(error.contains("not the public key of"), "{error}");
        std::fs::write(&path, kept).expect("it is written");
        Signer::load_or_create(&path, &public).expect("both are back");
    }

    fn signed(signer: &Signer) -> SafetyRecord {
        let score = ConceptScore { concept: "axe".into(), z: 1.5, gate: 3.0, ..Default::default() };
        let step = StepRecord { step: 3, scores: vec![score.clone()], ..Default::default() };
        let mut signed = SafetyRecord {
            final_scores: vec![score],
            reported_by_worker: Some(WorkerReport { trajectory: vec![step], ..Default::default() }),
            prompt: "a cat".into(),
            ..record()
        };
        signer.sign(&mut signed);
        signed
    }

    #[test]
    fn spoiled_records_are_not_believed() {
        let signer = Signer::generate();
        let (signed, trusted) = (signed(&signer), [signer.public()]);
        fuzz(spoiled(signed.encode_to_vec()), |bytes| {
            let Ok(read) = SafetyRecord::decode(&*bytes) else { return };
            let believed = bounded(bytes.len(), || verify(&read, &trusted).is_ok());
            assert_eq!(believed, read == signed);
        });
        fuzz(spoiled_text(&crate::record::to_json(&signed)), |text| {
            let Ok(read) = bounded(text.len(), || crate::record::from_json(&text)) else { return };
            assert_eq!(verify(&read, &trusted).is_ok(), read == signed);
            let again = crate::record::from_json(&crate::record::to_json(&read));
            assert_eq!(again.expect("it reads back").encode_to_vec(), read.encode_to_vec());
        });
    }

    #[test]
    fn spoiled_key_files_are_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, public) = (folder.path().join("key.pem"), folder.path().join("public.pem"));
        Signer::load_or_create(&path, &public).expect("they are made");
        let valid = |path| std::fs::read(path).expect("it is there");
        let (private_pem, public_pem) = (valid(&path), valid(&public));
        fuzz(spoiled(private_pem), |bytes| {
            std::fs::write(&path, &*bytes).expect("it is written");
            if let Err(error) = bounded(bytes.len(), || Signer::load(&path)) {
                assert!(error.to_string().contains("key.pem"), "{error}");
            }
        });
        fuzz(spoiled(public_pem), |bytes| {
            std::fs::write(&public, &*bytes).expect("it is written");
            match bounded(bytes.len(), || PublicKey::load(&public)) {
                Ok(key) => {
                    std::fs::write(&public, key.to_pem()).expect("it is written");
                    assert_eq!(PublicKey::load(&public).expect("it reads back"), key);
                }
                Err(error) => assert!(error.to_string().contains("public.pem"), "{error}"),
            }
        });
    }
}
