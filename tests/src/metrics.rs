//! Pages of metrics, as a scraper reads them.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::PATIENCE;

/// The values on the page at `url`, by name with labels.
pub async fn scrape(url: &str) -> Result<BTreeMap<String, f64>> {
    let address = url.trim_start_matches("http://").trim_end_matches("/metrics");
    let page = get(address, "/metrics").await?;
    let (head, body) = page.split_once("\r\n\r\n").context("a header")?;
    ensure!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain"), "{url}: {head}");
    let mut values = BTreeMap::new();
    for line in body.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (key, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
        ensure!(values.insert(key.to_owned(), value.parse()?).is_none(), "{url}: {key} twice");
    }
    Ok(values)
}

/// The answer to a GET, header and all.
pub async fn get(address: &str, path: &str) -> Result<String> {
    let answer = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    timeout(PATIENCE, answer).await.with_context(|| format!("{address}{path} did not answer"))?
}
