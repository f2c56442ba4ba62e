//! Hears what other processes change: a blocking read of the bell stream on a connection of its own.

use std::{sync::Arc, time::Duration};

use ::redis::{RedisResult, aio::MultiplexedConnection};
use fairlead_common::backoff::Backoff;
use tokio::sync::mpsc;

use super::link::Link;
use crate::store::Change;

/// How long one read waits for news.
const BLOCK: Duration = Duration::from_secs(5);
/// News read at once.
const PAGE: usize = 1_000;

/// Follows the stream `bell` until the receiver of `news` is dropped.
pub(super) fn follow(link: Arc<Link>, bell: String, news: mpsc::Sender<Change>) {
    tokio::spawn(async move {
        let closed = news.clone();
        tokio::select! {
            () = closed.closed() => {}
            () = run(&link, &bell, news) => {}
        }
    });
}

async fn run(link: &Link, bell: &str, news: mpsc::Sender<Change>) {
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
    loop {
        let Err(error) = read(link, bell, &news, &mut backoff).await else { return };
        tracing::warn!(%error, "news from other coordinators are interrupted");
        tokio::time::sleep(backoff.next_delay()).await;
    }
}

/// Reads until the connection breaks (an error) or nobody listens.
async fn read(
    link: &Link,
    bell: &str,
    news: &mpsc::Sender<Change>,
    backoff: &mut Backoff,
) -> RedisResult<()> {
    let mut connection = link.own(BLOCK).await?;
    let (mut last, mut heard) = newest(&mut connection, bell).await?;
    backoff.reset();
    // What came before this connection was missed.
    if news.send(Change::Everything).await.is_err() {
        return Ok(());
    }
    type Entries = Vec<(String, (String, String, String, String, String, u64))>;
    loop {
        let mut command = ::redis::cmd("XREAD");
        command.arg("BLOCK").arg(BLOCK.as_millis() as u64).arg("COUNT").arg(PAGE);
        command.arg("STREAMS").arg(bell).arg(&last);
        let streams: Option<Vec<(String, Entries)>> = command.query_async(&mut connection).await?;
        let Some((_, entries)) = streams.and_then(|mut streams| streams.pop()) else {
            // A server that came back with an older clock names its entries lower than `last`.
            if newest(&mut connection, bell).await?.1 != heard {
                let replaced = "the stream was replaced";
                return Err((::redis::ErrorKind::Client, replaced).into());
            }
            continue;
        };
        for (id, (_, kind, _, value, _, number)) in entries {
            // Trimmed before they were read.
            let missed = number != heard + 1;
            (last, heard) = (id, number);
            if missed && news.send(Change::Everything).await.is_err() {
                return Ok(());
            }
            let change = match (kind.as_str(), value.parse(), value.parse()) {
                ("job", Ok(job), _) => Change::Job(job),
                ("lease", _, Ok(shard)) => Change::Lease(shard),
                ("queue", ..) => Change::Queue,
                ("members", ..) => Change::Members,
                // Of a later release.
                _ => Change::Everything,
            };
            if news.send(change).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Id and number of the newest entry.
async fn newest(connection: &mut MultiplexedConnection, bell: &str) -> RedisResult<(String, u64)> {
    let mut command = ::redis::cmd("XREVRANGE");
    command.arg(bell).arg("+").arg("-").arg("COUNT").arg(1);
    let entries: Vec<(String, Vec<String>)> = command.query_async(connection).await?;
    let newest = entries.into_iter().next();
    Ok(newest.map_or_else(
        || ("0-0".to_owned(), 0),
        |(id, fields)| (id, fields.last().and_then(|n| n.parse().ok()).unwrap_or_default()),
    ))
}
