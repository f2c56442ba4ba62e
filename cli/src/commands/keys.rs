//! `fairlead keys`: what a cluster and its clients prove themselves with.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use fairlead_common::{
    bounds,
    identity::{Identity, Role},
    signature::Signer,
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};

use crate::output::{ensure_folder, say, write_secret};

/// Name of the authority that `fairlead keys tls` makes.
const AUTHORITY: &str = "Fairlead cluster";
/// How long the authority's own certificate is valid.
const AUTHORITY_DAYS: i64 = 3_650;
/// Bytes of a client's key.
const KEY_BYTES: usize = 32;

/// Makes certificates for services, keys for clients and the key that signs safety records.
#[derive(Args)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Subcommand)]
enum Kind {
    /// Make a certificate for one process, and the cluster's authority where there is none yet.
    Tls(TlsKeysArgs),
    /// Make a key for a client and the line for its tenant in the policies file.
    Client(ClientKeyArgs),
    /// Make a key that signs safety records, and the public key that `fairlead verify` takes.
    Signing(SigningKeyArgs),
}

/// Writes NAME.pem and NAME-key.pem, signed by the authority in the same folder: ca.pem, ca-key.pem. Services
/// need ca.pem and their own two files; keep ca-key.pem away from all of them.
///
/// A certificate says for whom it is, as the URI fairlead://ROLE/NAME: a worker's makes no energy node. Its
/// serial number, or the name, on a line of the file of --tls-revoked ends its use.
#[derive(Args)]
struct TlsKeysArgs {
    /// What the process is there for: coordinator, worker, energy (a node), or operator, for the commands of a
    /// person who gives concepts to nodes and measures.
    #[arg(long, value_enum)]
    role: Role,
    /// Name of the process, e.g. coordinator, energy-1 or worker-1. It is the energy node's --node-id and the
    /// beginning of a worker's --worker-id.
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    name: String,
    /// Name or address that others reach it at; repeatable. A coordinator and an energy node need one; workers
    /// and operators only connect, and have none.
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    host: Vec<String>,
    /// Folder of the files.
    #[arg(long, value_name = "DIR", default_value = "certificates")]
    out: PathBuf,
    /// Days until the certificate is no longer valid.
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    days: u32,
}

/// "ca" is the name of the authority's own files.
fn parse_name(name: &str) -> Result<String, String> {
    bounds::name(name)?;
    match name {
        "ca" => Err("`ca` is the authority; take another".to_owned()),
        name => Ok(name.to_owned()),
    }
}

/// The key is in no other place: who has it is the tenant. The policies file gets its hash only.
#[derive(Args)]
struct ClientKeyArgs {
    /// File for the key, for --key-file. Default: it is printed.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// A coordinator without --signing-key makes one in its data directory by itself.
#[derive(Args)]
struct SigningKeyArgs {
    /// File for the private key, for --signing-key. The public one goes beside it: NAME.pub.pem.
    #[arg(long, value_name = "FILE", default_value = "signing-key.pem")]
    out: PathBuf,
}

pub(crate) fn run(args: KeysArgs) -> Result<ExitCode> {
    match args.kind {
        Kind::Tls(args) => tls(args)?,
        Kind::Client(args) => client(args)?,
        Kind::Signing(args) => signing(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn tls(args: TlsKeysArgs) -> Result<()> {
    let TlsKeysArgs { role, name, host, out, days } = args;
    match (role.is_reached(), host.is_empty()) {
        (true, true) => bail!("--host: others connect to the {role}; say at which name or address"),
        (false, false) => bail!("--host: nobody connects to the {role}; leave it out"),
        _ => {}
    }
    let folder = ensure_folder(&out)?;
    let authority = authority(&folder)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(host.clone())
        .with_context(|| format!("--host: {} is no name or address", host.join(",")))?;
    let uri = format!("fairlead://{role}/{name}");
    params.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
    params.distinguished_name.push(DnType::CommonName, &name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if role.is_reached() {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    valid_for(&mut params, days.into());
    let certificate = params.signed_by(&key, &authority)?;
    let serial = Identity::of(certificate.der())?.serial;
    let [cert_file, key_file] = ["", "-key"].map(|part| folder.join(format!("{name}{part}.pem")));
    write_secret(&key_file, key.serialize_pem().as_bytes())?;
    crate::output::write_file(&cert_file, certificate.pem().as_bytes())?;
    let reached = match host.as_slice() {
        [] => "connects to others, others cannot connect to it".to_owned(),
        hosts => format!("is reached at {}", hosts.join(", ")),
    };
    say!("{}: {role} `{name}`, {reached}; valid for {days} days", cert_file.display());
    say!("serial {serial}, for --tls-revoked should it be lost");
    say!(
        "--tls-cert {} --tls-key {} --tls-ca {}",
        cert_file.display(),
        key_file.display(),
        folder.join("ca.pem").display()
    );
    Ok(())
}

/// The authority in `folder`, made if there is none.
fn authority(folder: &Path) -> Result<Issuer<'static, KeyPair>> {
    let (cert_file, key_file) = (folder.join("ca.pem"), folder.join("ca-key.pem"));
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, AUTHORITY);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, AUTHORITY_DAYS);
    let key = match (cert_file.exists(), key_file.exists()) {
        (true, true) => {
            let pem = std::fs::read_to_string(&key_file)
                .with_context(|| format!("cannot read {}", key_file.display()))?;
            KeyPair::from_pem(&pem)
                .with_context(|| format!("{} holds no private key", key_file.display()))?
        }
        (false, false) => {
            let key = KeyPair::generate()?;
            write_secret(&key_file, key.serialize_pem().as_bytes())?;
            let certificate = params.self_signed(&key)?;
            crate::output::write_file(&cert_file, certificate.pem().as_bytes())?;
            say!("{}: a new authority; its key signs every certificate", cert_file.display());
            key
        }
        _ => bail!(
            "{} has only one of ca.pem and ca-key.pem; bring the other back, or take another --out",
            folder.display()
        ),
    };
    Ok(Issuer::new(params, key))
}

fn valid_for(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    // Clocks of machines differ.
    params.not_before = now - Duration::hours(1);
    params.not_after = now + Duration::days(days);
}

fn client(args: ClientKeyArgs) -> Result<()> {
    let key = hex::encode(rand::random::<[u8; KEY_BYTES]>());
    let hash = hex::encode(Sha256::digest(key.as_bytes()));
    match &args.out {
        Some(path) => {
            write_secret(path, format!("{key}\n").as_bytes())?;
            say!("{}: the key; give it to the client alone", path.display());
        }
        None => say!("{key}"),
    }
    say!("keys = [\"sha256:{hash}\"]");
    Ok(())
}

fn signing(args: SigningKeyArgs) -> Result<()> {
    let public = args.out.with_extension("pub.pem");
    if args.out.exists() {
        bail!("{} is there already; records that it signed need it to stay", args.out.display());
    }
    let signer = Signer::load_or_create(&args.out, &public)?;
    say!("{}: private, for `fairlead coordinator --signing-key`", args.out.display());
    say!(
        "{}: public, key {}, for `fairlead verify --signer`",
        public.display(),
        signer.public().id()
    );
    Ok(())
}
