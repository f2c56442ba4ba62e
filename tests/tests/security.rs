//! A cluster on TLS with tenants, as operators set it up with `fairlead keys`; and signed records.

use std::{
    path::{Path, PathBuf},
    process::Output,
};

use anyhow::{Context, Result, ensure};
use fairlead_common::{grpc, tls::TlsArgs};
use fairlead_proto::v1::{DescribeRequest, energy_service_client::EnergyServiceClient};
use fairlead_tests::{PATIENCE, Sandbox, asset, command};
use tokio::{process::Command, time::timeout};

async fn run(mut command: Command, folder: &Path) -> Result<Output> {
    let output = timeout(PATIENCE, command.current_dir(folder).output()).await;
    Ok(output.context("the command did not end")??)
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

/// Runs the binary and returns what it said, if it succeeded.
async fn said(arguments: &[&str], folder: &Path) -> Result<String> {
    let mut command = command();
    command.args(arguments);
    let output = run(command, folder).await?;
    ensure!(output.status.success(), "{arguments:?}: {}", text(&output));
    Ok(text(&output))
}

/// Runs the binary, which must fail, and returns what it said.
async fn refused(arguments: &[&str], folder: &Path) -> Result<String> {
    let mut command = command();
    command.args(arguments);
    let output = run(command, folder).await?;
    ensure!(!output.status.success(), "{arguments:?} succeeded: {}", text(&output));
    Ok(text(&output))
}

/// The list that services look at.
const REVOKED: &str = "revoked";

/// Makes a certificate and returns its serial number.
async fn certificate(role: &str, name: &str, more: &[&str], folder: &Path) -> Result<String> {
    let arguments = [&["keys", "tls", "--role", role, "--name", name][..], more].concat();
    let told = said(&arguments, folder).await?;
    let serial = told.lines().find_map(|line| line.strip_prefix("serial ")?.split(',').next());
    Ok(serial.context("no serial number")?.to_owned())
}

/// A command of the service `name` with its certificate, which logs everything into a file.
fn service(folder: &Path, name: &str) -> Result<Command> {
    service_as(folder, name, name)
}

/// The same, with the certificate `name`.
fn service_as(folder: &Path, service: &str, name: &str) -> Result<Command> {
    let file = |file: String| folder.join("certificates").join(file);
    let mut command = command();
    command
        .arg(service)
        .env("FAIRLEAD_TLS_CERT", file(format!("{name}.pem")))
        .env("FAIRLEAD_TLS_KEY", file(format!("{name}-key.pem")))
        .env("FAIRLEAD_TLS_CA", file("ca.pem".into()))
        .env("FAIRLEAD_TLS_REVOKED", folder.join(REVOKED))
        .env("FAIRLEAD_LOG", "trace")
        .stderr(std::fs::File::create(folder.join(format!("{name}.log")))?);
    Ok(command)
}

struct Secured {
    // Ends the processes when it is dropped.
    _sandbox: Sandbox,
    folder: PathBuf,
    coordinator: String,
    energy: String,
}

/// Coordinator, energy node and worker with certificates; tenants "acme" and "other" with their keys in
/// files of those names.
async fn secured() -> Result<Secured> {
    let mut sandbox = Sandbox::empty(Vec::new())?;
    let folder = sandbox.folder().to_owned();
    for role in ["coordinator", "energy"] {
        certificate(role, role, &["--host", "127.0.0.1"], &folder).await?;
    }
    certificate("worker", "worker", &[], &folder).await?;
    std::fs::write(folder.join(REVOKED), "# nobody\n")?;
    let mut policies = "known_concepts = [\"*\"]\n".to_owned();
    policies += &std::fs::read_to_string(asset("policies.toml"))?;
    for tenant in ["acme", "other"] {
        let told = said(&["keys", "client", "--out", tenant], &folder).await?;
        let line = told.lines().find(|line| line.starts_with("keys = ")).context("no line")?;
        policies += &format!("\n[tenants.{tenant}]\n{line}\n");
    }
    let file = folder.join("policies.toml");
    std::fs::write(&file, policies)?;

    let mut command = service(&folder, "coordinator")?;
    command.args(["--listen", "127.0.0.1:0", "--data-dir"]).arg(folder.join("data"));
    command.arg("--policies").arg(file);
    let coordinator = sandbox.spawn("coordinator", command, "listening on ").await?;
    let mut command = service(&folder, "energy")?;
    command.args(["--listen", "127.0.0.1:0", "--coordinator", &coordinator]);
    command.arg("--model").arg(asset("emojiland-clip"));
    command.arg("--concepts").arg(asset("concepts"));
    command.arg("--calibrations").arg(asset("calibrations"));
    let energy = sandbox.spawn("energy", command, "listening on ").await?;
    let mut command = service(&folder, "worker")?;
    command.args(["--coordinator", &coordinator, "--metrics-listen", "127.0.0.1:0"]);
    command.arg("--model").arg(asset("emojiland-sd"));
    sandbox.spawn("worker", command, "metrics at ").await?;
    Ok(Secured { _sandbox: sandbox, folder, coordinator, energy })
}

impl Secured {
    /// Runs a client's command with a key.
    async fn client(&self, arguments: &[&str], key: &str) -> Result<Output> {
        let mut command = command();
        command
            .args(arguments)
            .args(["--server", &self.coordinator, "--tls-ca", "certificates/ca.pem"])
            .args(["--key-file", key])
            .env("FAIRLEAD_LOG", "trace");
        run(command, &self.folder).await
    }

    /// Nothing that anybody logged holds a key.
    fn assert_silent(&self, said: &Output) -> Result<()> {
        let read = |file: &str| std::fs::read_to_string(self.folder.join(file));
        let mut secrets = vec![read("acme")?, read("other")?];
        for service in ["coordinator", "energy", "worker"] {
            secrets.push(read(&format!("certificates/{service}-key.pem"))?);
        }
        secrets.push(read("data/signing-key.pem")?);
        let lines = secrets.iter().flat_map(|secret| secret.lines());
        let secrets: Vec<&str> = lines.filter(|line| line.len() >= 32).collect();
        ensure!(secrets.len() >= 6, "there is something to look for");
        for log in ["coordinator.log", "energy.log", "worker.log"] {
            let log = read(log)?;
            ensure!(log.contains("TRACE"), "everything is logged");
            ensure!(!log.contains('\x1b'), "a file has no colours");
            ensure!(!secrets.iter().any(|secret| log.contains(secret)), "a log holds a secret");
        }
        let said = text(said);
        ensure!(said.contains("TRACE") && !secrets.iter().any(|secret| said.contains(secret)));
        Ok(())
    }
}

const OWL: [&str; 6] = ["generate", "an owl on a green background", "--seed", "3", "--out", "made"];
const IMAGE: &str = "made/an-owl-on-a-green-background-3.png";

#[tokio::test]
async fn a_cluster_serves_those_who_have_keys_and_certificates() -> Result<()> {
    let cluster = secured().await?;
    let folder = cluster.folder.as_path();
    let (coordinator, energy) = (cluster.coordinator.as_str(), cluster.energy.as_str());
    assert!(coordinator.starts_with("https://") && energy.starts_with("https://"));
    // It waits for the worker and the node, which may still be loading.
    let made = cluster.client(&OWL, "acme").await?;
    ensure!(made.status.success(), "{}", text(&made));
    cluster.assert_silent(&made)?;

    std::fs::write(folder.join("wrong"), "0123")?;
    let wrong = cluster.client(&OWL, "wrong").await?;
    assert!(text(&wrong).contains("the key is no tenant's"), "{}", text(&wrong));
    let ca = ["--tls-ca", "certificates/ca.pem"];
    let without = [&OWL[..], &["--server", coordinator], &ca].concat();
    assert!(refused(&without, folder).await?.contains("no key"));
    let clear = coordinator.replace("https://", "http://");
    refused(&[&OWL[..], &["--server", &clear, "--key-file", "acme"]].concat(), folder).await?;
    let stranger = [&OWL[..], &["--server", coordinator, "--key-file", "acme"]].concat();
    refused(&stranger, folder).await?;

    // The record of its own image, and not of another's.
    let own = cluster.client(&["inspect", IMAGE], "acme").await?;
    assert!(text(&own).contains("as recorded"), "{}", text(&own));
    let others = cluster.client(&["inspect", IMAGE], "other").await?;
    assert!(text(&others).contains("does not exist"), "{}", text(&others));

    // A client's key makes no service.
    let mut worker = command();
    worker.args(["worker", "--coordinator", coordinator]).args(ca);
    worker.arg("--model").arg(asset("emojiland-sd"));
    let worker = run(worker, folder).await?;
    assert!(!worker.status.success());
    assert!(text(&worker).contains("for the cluster's services"), "{}", text(&worker));
    let ca = TlsArgs { tls_ca: Some(folder.join(ca[1])), ..TlsArgs::default() };
    let channel = grpc::node_channel("energy", energy, PATIENCE, &ca.load()?)?;
    let described = EnergyServiceClient::new(channel).describe(DescribeRequest {}).await;
    assert!(described.is_err(), "an energy node answered somebody without a certificate");
    Ok(())
}

#[tokio::test]
async fn a_signed_record_vouches_for_one_file() -> Result<()> {
    let cluster = secured().await?;
    let folder = cluster.folder.as_path();
    let made = cluster.client(&OWL, "acme").await?;
    ensure!(made.status.success(), "{}", text(&made));
    let verify = ["verify", IMAGE, "--signer", "data/signing-key.pub.pem"];
    let verified = said(&verify, folder).await?;
    assert!(verified.contains("released under policy `default`"), "{verified}");
    assert!(verified.contains("20 concepts checked; signed with key"), "{verified}");
    let asked = cluster.client(&verify, "acme").await?;
    assert!(asked.status.success(), "{}", text(&asked));

    said(&["keys", "signing", "--out", "another.pem"], folder).await?;
    let another = refused(&["verify", IMAGE, "--signer", "another.pub.pem"], folder).await?;
    assert!(another.contains("NOT VERIFIED") && another.contains("none of the keys"), "{another}");
    let private = refused(&["verify", IMAGE, "--signer", "another.pem"], folder).await?;
    assert!(private.contains("no Ed25519 public key"), "{private}");

    let (image, record) = (folder.join(IMAGE), folder.join(IMAGE).with_extension("json"));
    let (png, json) = (std::fs::read(&image)?, std::fs::read_to_string(&record)?);
    for (from, to) in
        [("an owl on a green", "a cat on a green"), ("\"seed\": \"3\"", "\"seed\": \"4\"")]
    {
        ensure!(json.contains(from), "{json}");
        std::fs::write(&record, json.replace(from, to))?;
        let changed = refused(&verify, folder).await?;
        assert!(changed.contains("it was changed after it was signed"), "{changed}");
    }
    let unsigned = json[..json.find("\"signature\"").context("no signature")?].trim_end();
    std::fs::write(&record, format!("{}}}", unsigned.trim_end_matches(',')))?;
    assert!(refused(&verify, folder).await?.contains("the record is not signed"));
    std::fs::write(&record, &json)?;
    // Of the pixels of another image, with the text chunks of this one.
    let mut changed = png.clone();
    let at = changed.windows(4).position(|name| name == b"tEXt").context("no text")?;
    let word = changed[at..].windows(5).position(|word| word == b"green").context("no word")?;
    changed[at + word] = b'G';
    std::fs::write(&image, &changed)?;
    let changed = refused(&verify, folder).await?;
    assert!(changed.contains("NOT VERIFIED"), "{changed}");
    std::fs::remove_file(&record)?;
    assert!(refused(&verify, folder).await?.contains("no record beside the image"));
    Ok(())
}

#[tokio::test]
async fn nothing_listens_in_the_clear_where_others_can_connect() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let coordinator = ["coordinator", "--listen", "0.0.0.0:0"];
    let (model, concepts) = (asset("emojiland-clip"), asset("concepts"));
    let [model, concepts] = [&model, &concepts].map(|path| path.to_str().unwrap_or_default());
    let energy = ["energy", "--listen", "0.0.0.0:0", "--model", model, "--concepts", concepts];
    for service in [&coordinator[..], &energy] {
        let clear = refused(service, folder).await?;
        assert!(clear.contains("--tls-cert") && clear.contains("--insecure"), "{clear}");
    }
    certificate("coordinator", "coordinator", &["--host", "localhost"], folder).await?;
    let tls = [
        "--tls-cert",
        "certificates/coordinator.pem",
        "--tls-key",
        "certificates/coordinator-key.pem",
        "--tls-ca",
        "certificates/ca.pem",
    ];
    let open = refused(&[&coordinator[..], &tls].concat(), folder).await?;
    assert!(open.contains("[tenants.NAME]") && open.contains("--insecure"), "{open}");
    // Any energy node could have jobs refused.
    let open = refused(&[&coordinator[..], &tls, &["--insecure"]].concat(), folder).await?;
    assert!(open.contains("known_concepts = "), "{open}");

    let mut sandbox = Sandbox::empty(Vec::new())?;
    let mut insecure = command();
    insecure.args(coordinator).args(["--insecure", "--data-dir"]).arg(folder.join("data"));
    sandbox.spawn("coordinator", insecure, "listening on ").await?;

    for (spoiled, problem) in [
        (["--tls-cert", "none.pem"], "cannot read none.pem"),
        (["--tls-key", "certificates/ca.pem"], "no private key in PEM form"),
        (["--tls-cert", "certificates/ca-key.pem"], "no certificate in PEM form"),
    ] {
        let mut arguments = tls;
        let at = arguments.iter().position(|flag| *flag == spoiled[0]).context("a flag")?;
        arguments[at + 1] = spoiled[1];
        let refused = refused(&[&coordinator[..], &arguments].concat(), folder).await?;
        assert!(refused.contains(spoiled[0]) && refused.contains(problem), "{refused}");
    }
    let half = refused(&[&coordinator[..], &tls[..2]].concat(), folder).await?;
    assert!(half.contains("--tls-key"), "{half}");
    Ok(())
}

#[tokio::test]
async fn a_service_needs_the_certificate_of_its_role() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    certificate("worker", "worker-1", &[], folder).await?;
    let tls = |name: &str| {
        ["tls-cert", "tls-key", "tls-ca"].map(|flag| match flag {
            "tls-cert" => format!("--tls-cert=certificates/{name}.pem"),
            "tls-key" => format!("--tls-key=certificates/{name}-key.pem"),
            _ => "--tls-ca=certificates/ca.pem".to_owned(),
        })
    };
    let worker = tls("worker-1");
    let worker: Vec<&str> = worker.iter().map(String::as_str).collect();
    let (model, concepts) = (asset("emojiland-clip"), asset("concepts"));
    let [model, concepts] = [&model, &concepts].map(|path| path.to_str().unwrap_or_default());
    let energy = ["energy", "--model", model, "--concepts", concepts];
    let wrong = refused(&[&energy[..], &worker[..]].concat(), folder).await?;
    assert!(wrong.contains("but this service has the role energy"), "{wrong}");
    assert!(wrong.contains("--role energy --name worker-1 --host HOST"), "{wrong}");
    let cases: [(&[&str], &str); 6] = [
        (&["--role", "energy", "--name", "a"], "--host: others connect to the energy"),
        (&["--role", "worker", "--name", "a", "--host", "b"], "--host: nobody connects"),
        (&["--role", "worker", "--name", "a b"], "letters, digits"),
        (&["--role", "worker", "--name", "ca"], "`ca` is the authority"),
        (&["--role", "root", "--name", "a"], "operator"),
        (&["--name", "a"], "--role"),
    ];
    for (arguments, part) in cases {
        let told = refused(&[&["keys", "tls"][..], arguments].concat(), folder).await?;
        assert!(told.contains(part), "{told}");
    }
    Ok(())
}

#[tokio::test]
async fn a_revoked_worker_loses_its_stream_and_a_renewed_certificate_is_taken_up() -> Result<()> {
    let cluster = secured().await?;
    let folder = cluster.folder.as_path();
    let made = cluster.client(&OWL, "acme").await?;
    ensure!(made.status.success(), "{}", text(&made));
    // A second worker, whose certificate is lost.
    let lost = certificate("worker", "lost", &[], folder).await?;
    let mut sandbox = Sandbox::empty(Vec::new())?;
    let mut worker = service_as(folder, "worker", "lost")?;
    worker.args(["--coordinator", &cluster.coordinator, "--metrics-listen", "127.0.0.1:0"]);
    worker.arg("--model").arg(asset("emojiland-sd"));
    sandbox.spawn("lost", worker, "metrics at ").await?;
    let said = async |file: &str, part: &str| {
        let read = async {
            while !std::fs::read_to_string(folder.join(file)).is_ok_and(|log| log.contains(part)) {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        let within = timeout(PATIENCE, read).await;
        within.with_context(|| format!("{file} does not say {part:?}"))
    };
    said("coordinator.log", "\"lost/").await?;
    std::fs::write(folder.join(REVOKED), format!("{lost}  # lost with its laptop\n"))?;
    said("lost.log", "stream ended").await?;
    said("coordinator.log", "the certificate of worker `lost` is revoked").await?;

    // Everybody else is served, by a coordinator with a new certificate.
    certificate("coordinator", "coordinator", &["--host", "127.0.0.1"], folder).await?;
    said("coordinator.log", "certificates read again").await?;
    let again = cluster.client(&OWL, "acme").await?;
    ensure!(again.status.success(), "{}", text(&again));
    Ok(())
}
