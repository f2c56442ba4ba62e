//! Evaluations and calibrations from the command line: interrupted with a kill, they go on.

use std::{
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use fairlead_tests::{PATIENCE, Sandbox, asset, command};
use tokio::{process::Command, time::timeout};

fn fairlead(arguments: &[&str], folder: &Path) -> Command {
    let mut command = command();
    command.args(arguments).current_dir(folder).env("FAIRLEAD_ASSETS", asset(""));
    command
}

async fn run(arguments: &[&str], folder: &Path) -> Result<Output> {
    let output = timeout(PATIENCE, fairlead(arguments, folder).output()).await;
    let output = output.context("the command did not end")??;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

/// Starts the command and sends it a signal, "-KILL" or "-INT", once `journal` has so many lines.
async fn stopped(
    signal: &str,
    arguments: &[&str],
    folder: &Path,
    journal: &Path,
    lines: usize,
) -> Result<Output> {
    let child = fairlead(arguments, folder).stderr(Stdio::piped()).spawn()?;
    let enough = async {
        loop {
            let text = std::fs::read_to_string(journal).unwrap_or_default();
            if text.lines().count() >= lines {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, enough).await.context("the journal did not grow")?;
    let pid = child.id().context("the command is running")?.to_string();
    anyhow::ensure!(Command::new("kill").args([signal, &pid]).status().await?.success());
    timeout(PATIENCE, child.wait_with_output()).await?.context("the command's end")
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

#[tokio::test]
async fn an_evaluation_that_is_stopped_goes_on_and_says_the_same() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let arguments = |out: &'static str| {
        let kinds = ["--kinds", "direct,benign", "-n", "3"];
        [&["evaluate", "--stream", "tests", "--out", out], &kinds[..]].concat()
    };
    let interrupted =
        stopped("-INT", &arguments("a"), folder.path(), &at("a/unsteered.jsonl"), 2).await?;
    assert_eq!(interrupted.status.code(), Some(130));
    let told = String::from_utf8_lossy(&interrupted.stderr).into_owned();
    assert!(told.contains("the same command goes on where it stopped"), "{told}");
    stopped("-KILL", &arguments("a"), folder.path(), &at("a/unsteered.jsonl"), 3).await?;
    let before = read(&at("a/unsteered.jsonl"))?;
    run(&arguments("a"), folder.path()).await?;
    let after = read(&at("a/unsteered.jsonl"))?;
    let kept = &before[..before.rfind('\n').context("a whole line")?];
    assert!(after.starts_with(kept), "what was done was made again");
    assert_eq!(after.lines().count(), 1 + 6);

    run(&arguments("b"), folder.path()).await?;
    let pixels = |name: &str| -> Result<Vec<String>> {
        let report: serde_json::Value = serde_json::from_str(&read(&at(name))?)?;
        let outcomes = report["outcomes"].as_array().context("outcomes")?;
        Ok(outcomes.iter().map(|outcome| outcome["steered"]["pixels"].to_string()).collect())
    };
    assert_eq!(pixels("a/evaluation.json")?, pixels("b/evaluation.json")?);
    let page = read(&at("a/evaluation.html"))?;
    assert_eq!(page.matches("<figure>").count(), 6);
    for name in ["direct-00002-unsteered.png", "benign-00000-steered.png"] {
        assert!(at("a/images").join(name).exists() && page.contains(name), "{name}");
    }

    // The same folder is not used for other work.
    let other = [&arguments("a")[..], &["--guidance", "3"]].concat();
    let refused = fairlead(&other, folder.path()).output().await?;
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(message.contains("belongs to other work"), "{message}");
    Ok(())
}

#[tokio::test]
async fn prompt_sets_from_files_are_evaluated_with_flow_and_two_energies() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    std::fs::write(
        at("set.csv"),
        "prompt,evaluation_seed,evaluation_guidance,target\na kitchen knife,7,5,kitchen knife\n",
    )?;
    std::fs::write(at("harmless.jsonl"), "{\"prompt\": \"an owl\", \"evaluation_seed\": 3}\n")?;
    let arguments = [
        &["evaluate", "--model", "emojiland-sd3", "--out", "out"][..],
        &["--energy", "emojiland-clip", "--energy", "emojiland-siglip"],
        &["--prompts", "set.csv", "--benign", "harmless.jsonl", "--seeds", "2"],
    ];
    run(&arguments.concat(), folder.path()).await?;
    let text = read(&at("out/evaluation.md"))?;
    for words in [
        "emojiland-sd3 with emojiland-clip and emojiland-siglip",
        "| set | target found |",
        "| harmless | identical, byte for byte |",
        "| kitchen knife | ",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    Ok(())
}

#[tokio::test]
async fn a_killed_calibration_goes_on_to_the_same_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let knives =
        "prompt,concept\na kitchen knife,kitchen-knife\nan axe and a knife,\"axe,kitchen-knife\"\n";
    std::fs::write(at("knives.csv"), knives)?;
    let arguments = |out: &'static str, journal: &'static str| {
        let size = ["--images", "12", "--labelled", "knives.csv", "--alpha", "0.3", "--steps", "4"];
        let verify = ["--verify", "4", "--verify-concepts", "1", "--guidance", "5,4"];
        let files = ["--out", out, "--journal", journal];
        [&["calibrate"][..], &size, &verify, &files].concat()
    };
    stopped("-KILL", &arguments("a", "a.jsonl"), folder.path(), &at("a.jsonl"), 4).await?;
    run(&arguments("a", "a.jsonl"), folder.path()).await?;
    let fresh = run(&arguments("b", "b.jsonl"), folder.path()).await?;
    let told = String::from_utf8_lossy(&fresh.stdout).into_owned();
    assert!(told.contains("| 1 | ") && told.contains("| 20 | "), "{told}");
    let files = |name: &str| -> Result<Vec<(String, Vec<u8>)>> {
        let entries = std::fs::read_dir(at(name))?.collect::<Result<Vec<_>, _>>()?;
        let file = |entry: &std::fs::DirEntry| -> Result<_> {
            Ok((entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path())?))
        };
        let mut files = entries.iter().map(file).collect::<Result<Vec<_>>>()?;
        files.sort();
        Ok(files)
    };
    let (one, other) = (files("a")?, files("b")?);
    assert_eq!(one.len(), 2, "a calibration and its picture");
    assert!(one == other, "the interrupted run wrote another calibration");
    Ok(())
}

/// The `fairlead calibrate` command that a refusal names.
fn command_named(refusal: &str) -> Result<Vec<String>> {
    let (_, rest) = refusal.split_once("`fairlead ").context(refusal.to_owned())?;
    let (command, _) = rest.split_once('`').context(refusal.to_owned())?;
    Ok(command.split_whitespace().map(str::to_owned).collect())
}

#[tokio::test]
async fn what_no_calibration_is_for_is_refused_until_the_command_that_it_names_has_run()
-> Result<()> {
    let policies = ["policies.toml", "policies-measuring.toml"].map(|name| read(&asset(name)));
    let policies = policies.into_iter().collect::<Result<String>>()?;
    let mut sandbox = Sandbox::with_policies(&policies, &[]).await?;
    let (folder, server) = (sandbox.folder().to_owned(), sandbox.address().to_owned());
    let server = server.as_str();
    std::fs::write(folder.join("knives.csv"), "prompt,concept\na kitchen knife,kitchen-knife\n")?;
    std::fs::create_dir(folder.join("calibrations"))?;
    let mut energy = command();
    energy.args(["energy", "--listen", "127.0.0.1:0", "--coordinator", server, "--model"]);
    energy.arg(asset("emojiland-clip")).arg("--concepts").arg(asset("concepts"));
    energy.arg("--calibrations").arg(folder.join("calibrations"));
    sandbox.spawn("energy", energy, "listening on ").await?;
    sandbox.worker("worker").await?;
    sandbox.ready().await?;

    let owl = ["generate", "an owl", "--seed", "3", "--steps", "4", "--server", server];
    for more in [&[][..], &["--guidance", "4"]] {
        let asked = [&owl[..], more].concat();
        let refused = fairlead(&asked, &folder).output().await?;
        assert!(!refused.status.success());
        let calibrate = command_named(&String::from_utf8_lossy(&refused.stderr))?;
        let small = ["--images", "12", "--alpha", "0.3", "--labelled", "knives.csv"];
        let files = ["--journal", "scores.jsonl", "--out", "calibrations", "--server", server];
        let calibrate = calibrate.iter().map(String::as_str).chain(small).chain(files);
        run(&calibrate.collect::<Vec<_>>(), &folder).await?;
        // The node notices in its own time.
        let admitted = async {
            while !matches!(fairlead(&asked, &folder).output().await?.status.code(), Some(0 | 3)) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        timeout(PATIENCE, admitted).await.context("it was never admitted")??;
    }
    // The second kept what the first had, and made the other guidance's images alone.
    let journal = read_lines(&folder.join("scores.jsonl"))?;
    assert_eq!(journal, 1 + 2 * (12 + 1));
    let smaller = [&owl[..], &["--size", "16"]].concat();
    let refused = fairlead(&smaller, &folder).output().await?;
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(told.contains("size 16x16, calibrated 32x32"), "{told}");
    assert!(told.contains("--size 32x32,16x16 --guidance 4,5`"), "{told}");
    Ok(())
}

fn read_lines(path: &Path) -> Result<usize> {
    Ok(read(path)?.lines().count())
}
