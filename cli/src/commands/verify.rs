//! `fairlead verify`: whether a cluster that you trust released these very files.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, bail};
use clap::Args;
use fairlead_common::signature::{self, PublicKey};
use fairlead_proto::v1::ImageStatus;

use crate::{
    output::{chain, say},
    provenance::{Picture, RecordArgs, Records},
};

/// Checks that each image is byte for byte one that was released: its safety record must be signed with
/// a key that you trust, say so, and have the file's SHA-256. Exit status 1 if one is not.
#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// PNGs made by Fairlead.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Public key to trust, repeatable: signing-key.pub.pem of the coordinator's data directory, brought
    /// here on a way you trust.
    #[arg(
        long = "signer",
        value_name = "FILE",
        env = "FAIRLEAD_SIGNERS",
        value_delimiter = ',',
        required = true
    )]
    signers: Vec<PathBuf>,
    #[command(flatten)]
    records: RecordArgs,
}

pub(crate) async fn run(args: VerifyArgs) -> Result<ExitCode> {
    let trusted =
        args.signers.iter().map(|path| PublicKey::load(path)).collect::<Result<Vec<_>, _>>()?;
    let records = args.records.open()?;
    let mut code = ExitCode::SUCCESS;
    for image in &args.images {
        let image = image.as_path();
        match verify(image, &records, &trusted).await {
            Ok(says) => say!("{}: {says}", image.display()),
            Err(error) => {
                say!("{}: NOT VERIFIED: {}", image.display(), chain(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

async fn verify(
    image: &std::path::Path,
    records: &Records,
    trusted: &[PublicKey],
) -> Result<String> {
    let picture = Picture::open(image)?;
    let Some(record) = records.of(&picture).await? else {
        bail!("no record beside the image; --server asks a coordinator for it");
    };
    let key = signature::verify(&record, trusted)?;
    picture.check(&record)?;
    if record.status() != ImageStatus::Released {
        bail!("its record says {}", record.status().as_str_name());
    }
    let policy = record.policy.unwrap_or_default();
    let checked = match policy.concepts.len() {
        0 => "NO concept was checked".to_owned(),
        concepts if policy.observe_only => format!("{concepts} concepts observed, none enforced"),
        concepts => format!("{concepts} concepts checked"),
    };
    Ok(format!("released under policy `{}`, {checked}; signed with key {}", policy.name, key.id()))
}
