//! Where a PNG comes from: its text chunks and its safety record.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use fairlead_common::{record, text};
use fairlead_proto::v1::SafetyRecord;
use sha2::{Digest, Sha256};

use crate::{client::Client, credentials::CredentialArgs};

/// Largest file looked at.
const MAX_BYTES: u64 = 256 << 20;
/// Text chunk that names the record.
const RECORD_KEYWORD: &str = "fairlead-record";

/// Where the records of images are.
#[derive(Args)]
pub(crate) struct RecordArgs {
    /// Take safety records from this coordinator. Default: NAME.json beside NAME.png.
    #[arg(long, value_name = "URL", env = "FAIRLEAD_SERVER")]
    server: Option<String>,
    #[command(flatten)]
    credentials: CredentialArgs,
}

impl RecordArgs {
    /// Something that finds records.
    pub(crate) fn open(&self) -> Result<Records> {
        let server = self.server.as_deref();
        let client = server.map(|server| Client::new(server, self.credentials.load()?));
        Ok(Records(client.transpose()?))
    }
}

/// Finds the records of images: at a coordinator, or in files beside them.
pub(crate) struct Records(Option<Client>);

impl Records {
    /// The record that `image` names; `None` if there is no file beside it.
    pub(crate) async fn of(&self, image: &Picture) -> Result<Option<SafetyRecord>> {
        let record = match &self.0 {
            Some(client) => client.record(&image.record_id).await?,
            None => {
                let path = image.path.with_extension("json");
                if !path.exists() {
                    return Ok(None);
                }
                let text =
                    text::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
                record::from_json(&text).with_context(|| path.display().to_string())?
            }
        };
        if record.record_id != image.record_id {
            let named = &image.record_id;
            bail!("the image names record {named}, the record found is {}", record.record_id);
        }
        Ok(Some(record))
    }
}

/// A PNG that Fairlead made, or that says so.
pub(crate) struct Picture {
    path: PathBuf,
    /// Text chunks in order: keyword and text.
    pub(crate) texts: Vec<(String, String)>,
    record_id: String,
    /// SHA-256 of the file, lower-case hex.
    pub(crate) sha256: String,
}

impl Picture {
    /// Reads a file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let size = file.metadata()?.len();
        if size > MAX_BYTES {
            bail!("{} has {size} bytes, more than the {MAX_BYTES} looked at", path.display());
        }
        let bytes = std::fs::read(path)?;
        let texts = texts(&bytes).with_context(|| format!("{} is no whole PNG", path.display()))?;
        let Some((_, record_id)) = texts.iter().find(|(keyword, _)| keyword == RECORD_KEYWORD)
        else {
            bail!("{} carries no `{RECORD_KEYWORD}`: Fairlead did not make it", path.display());
        };
        Ok(Self {
            path: path.to_owned(),
            record_id: record_id.clone(),
            sha256: hex::encode(Sha256::digest(&bytes)),
            texts,
        })
    }

    /// Whether the file is the one that `record` is about.
    pub(crate) fn check(&self, record: &SafetyRecord) -> Result<()> {
        if self.sha256 != record.image_sha256 {
            bail!(
                "the file is not the one that was released: its sha256 is {}, the record's {}",
                self.sha256,
                record.image_sha256
            );
        }
        Ok(())
    }
}

/// All text chunks of a PNG, in order.
fn texts(bytes: &[u8]) -> Result<Vec<(String, String)>> {
    let mut reader = png::Decoder::new(BufReader::new(std::io::Cursor::new(bytes))).read_info()?;
    reader.finish()?;
    let info = reader.info();
    let mut texts = Vec::new();
    for chunk in &info.uncompressed_latin1_text {
        texts.push((chunk.keyword.clone(), chunk.text.clone()));
    }
    for chunk in &info.utf8_text {
        texts.push((chunk.keyword.clone(), chunk.get_text()?));
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, mend_png, spoiled};
    use proptest::prelude::any;

    fn png() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 4, 3);
        encoder.set_color(png::ColorType::Rgb);
        let text = |text: &str| text.to_owned();
        encoder.add_text_chunk(text(RECORD_KEYWORD), text("r")).expect("a text");
        encoder.add_itxt_chunk(text("parameters"), text("a cat")).expect("a text");
        encoder.add_ztxt_chunk(text("other"), text("packed")).expect("a text");
        let mut writer = encoder.write_header().expect("a header");
        writer.write_image_data(&[7; 36]).expect("pixels");
        writer.finish().expect("the end");
        bytes
    }

    #[test]
    fn spoiled_pictures_are_another_file_or_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("image.png");
        let valid = png();
        let record = SafetyRecord {
            record_id: "r".into(),
            image_sha256: hex::encode(Sha256::digest(&valid)),
            ..Default::default()
        };
        fuzz((spoiled(valid.clone()), any::<bool>()), |(bytes, mend)| {
            let mut bytes = bytes.to_vec();
            if mend {
                mend_png(&mut bytes);
            }
            std::fs::write(&path, &bytes).expect("it is written");
            match bounded(bytes.len(), || Picture::open(&path)) {
                Ok(picture) => assert_eq!(picture.check(&record).is_ok(), bytes == valid),
                Err(error) => assert!(format!("{error:#}").contains("image.png"), "{error:#}"),
            }
        });
    }
}
