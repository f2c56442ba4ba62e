//! The command line as a person uses it.

use std::{
    path::Path,
    process::{Output, Stdio},
};

use anyhow::{Context, Result};
use fairlead_tests::{PATIENCE, Sandbox, asset, command};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpListener,
    time::timeout,
};

async fn run(arguments: &[&str], folder: &Path) -> Result<Output> {
    let mut command = command();
    command.args(arguments).current_dir(folder).env("FAIRLEAD_ASSETS", asset(""));
    timeout(PATIENCE, command.output())
        .await
        .context("the command did not end")?
        .map_err(Into::into)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn generate_makes_an_image_that_inspect_confirms() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let arguments = ["generate", "an owl on a green background", "--seed", "3", "--out", "made"];
    let output = run(&arguments, folder.path()).await?;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let image = folder.path().join("made/an-owl-on-a-green-background-3.png");
    assert!(image.exists(), "{}", text(&output.stdout));

    let image = image.to_str().context("a temporary path is UTF-8")?;
    let inspected = run(&["inspect", image], folder.path()).await?;
    let shown = text(&inspected.stdout);
    assert!(inspected.status.success(), "{}", text(&inspected.stderr));
    for word in
        ["an owl on a green background", "Seed: 3", "Sampler: DDIM", "RELEASED", "as recorded"]
    {
        assert!(shown.contains(word), "`{word}` is not in: {shown}");
    }

    // As in `fairlead inspect IMAGE | true`: nobody reads what it says.
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let mut unread = command();
    unread.args(["inspect", image]).stdout(writer).stderr(Stdio::piped());
    let unread = timeout(PATIENCE, unread.spawn()?.wait_with_output()).await;
    let unread = unread.context("it did not end")??;
    assert_eq!(unread.status.code(), Some(141), "{}", text(&unread.stderr));
    assert_eq!(text(&unread.stderr), "");

    let mut bytes = std::fs::read(image)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(image, bytes)?;
    let tampered = run(&["inspect", image], folder.path()).await?;
    assert!(!tampered.status.success(), "a changed file passed: {}", text(&tampered.stdout));
    Ok(())
}

#[tokio::test]
async fn generate_talks_to_a_running_cluster_and_concepts_lists_it() -> Result<()> {
    let sandbox = Sandbox::emojiland().await?;
    let server = ["--server", sandbox.address()];
    let concepts = run(&[&["concepts"][..], &server].concat(), sandbox.folder()).await?;
    let shown = text(&concepts.stdout);
    assert!(shown.contains("kitchen-knife") && shown.contains("gambling"), "{shown}");
    let arguments = ["generate", "a banana", "-n", "2", "--seed", "5", "--out", "."];
    let output = run(&[&arguments[..], &server].concat(), sandbox.folder()).await?;
    assert!(output.status.success(), "{}", text(&output.stderr));
    for name in ["a-banana-5.png", "a-banana-6.png", "a-banana-5.json"] {
        assert!(sandbox.folder().join(name).exists(), "{name} is missing");
    }
    Ok(())
}

#[tokio::test]
async fn interrupting_generate_cancels_the_job() -> Result<()> {
    let sandbox = Sandbox::emojiland().await?;
    let mut generate = command();
    generate
        .args(["generate", "a cat", "-n", "64", "--max-shard-size", "1"])
        .args(["--server", sandbox.address()])
        .current_dir(sandbox.folder());
    let mut child = generate.stderr(std::process::Stdio::piped()).spawn()?;
    let job_id = timeout(PATIENCE, async {
        loop {
            let request = fairlead_proto::v1::ListJobsRequest::default();
            let jobs = sandbox.client()?.list_jobs(request).await?.into_inner().jobs;
            if let Some(job) = jobs.first() {
                return anyhow::Ok(job.job_id.clone());
            }
            tokio::task::yield_now().await;
        }
    })
    .await??;
    let pid = child.id().context("the command is running")?.to_string();
    let signalled = tokio::process::Command::new("kill").args(["-INT", &pid]).status().await?;
    assert!(signalled.success());
    let status = timeout(PATIENCE, child.wait()).await??;
    assert_eq!(status.code(), Some(130));
    let request = fairlead_proto::v1::GetJobRequest { job_id };
    let job = sandbox.client()?.get_job(request).await?.into_inner().job.context("the job")?;
    assert_eq!(job.state(), fairlead_proto::v1::JobState::Cancelled);
    Ok(())
}

#[tokio::test]
async fn up_serves_until_it_is_told_to_stop() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut up = command();
    up.args(["up", "--listen", "127.0.0.1:0", "--workers", "2"])
        .current_dir(folder.path())
        .env("FAIRLEAD_ASSETS", asset(""))
        .stdout(std::process::Stdio::piped());
    let mut child = up.spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout was piped")?).lines();
    let line = timeout(PATIENCE, lines.next_line()).await??.context("`up` ended at once")?;
    let address = line.strip_prefix("cluster ready at ").context(line.clone())?;
    let concepts = run(&["concepts", "--server", address], folder.path()).await?;
    assert!(concepts.status.success(), "{}", text(&concepts.stderr));
    let pid = child.id().context("`up` is running")?.to_string();
    tokio::process::Command::new("kill").args(["-TERM", &pid]).status().await?;
    let status = timeout(PATIENCE, child.wait()).await??;
    assert!(status.success(), "{status}");
    Ok(())
}

#[tokio::test]
async fn mistakes_are_named_with_what_to_do() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    std::fs::create_dir(at("empty"))?;
    std::fs::write(
        at("typo.toml"),
        "[[concept]]\nname = \"axe\"\ngroup = \"weapons\"\ntarget = [\"an axe\"]\n",
    )?;
    std::fs::write(at("not.png"), "no image")?;
    let taken = TcpListener::bind("127.0.0.1:0").await?;
    let taken = taken.local_addr()?.to_string();
    let (empty, typo, not_png) = (at("empty"), at("typo.toml"), at("not.png"));
    let generate = |extra: &[&'static str]| [&["generate", "a cat"], extra].concat();
    let mut cases: Vec<(Vec<String>, Vec<&str>)> = vec![
        (vec!["inspect".into(), not_png], vec!["not.png", "PNG"]),
        (vec!["up".into(), "--listen".into(), taken.clone()], vec![&taken, "--listen"]),
        (
            vec!["generate".into(), "a cat".into(), "--model".into(), empty],
            vec!["model_index.json"],
        ),
        (
            vec!["generate".into(), "a cat".into(), "--concepts".into(), typo],
            vec!["typo.toml", "line 4, column 1", ".target` is not known here", "targets"],
        ),
    ];
    let own = |arguments: Vec<&str>| arguments.into_iter().map(String::from).collect();
    for (arguments, words) in [
        (generate(&["--size", "63"]), vec!["width", "63"]),
        (generate(&["--steps", "0"]), vec!["steps"]),
        (generate(&["-n", "0"]), vec!["n"]),
        (generate(&["-n", "10000"]), vec!["n", "10000"]),
        (generate(&["--concept", "kitchen-knive"]), vec!["kitchen-knife"]),
        (generate(&["--server", "http://127.0.0.1:9"]), vec!["127.0.0.1:9 cannot be reached"]),
        (generate(&["--device", "cuda:9"]), vec!["cuda:9", "--features cuda"]),
        (vec!["generate", ""], vec!["prompt"]),
    ] {
        cases.push((own(arguments), words));
    }
    for (arguments, words) in cases {
        let borrowed: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = run(&borrowed, folder.path()).await?;
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
        assert!(!message.contains("panicked"), "{message}");
        for word in words {
            assert!(message.contains(word), "{arguments:?} lacks `{word}`: {message}");
        }
    }
    Ok(())
}
