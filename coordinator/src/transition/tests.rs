use std::collections::BTreeMap;

use fairlead_common::ids::{JobId, ShardId};
use proptest::prelude::*;

use super::*;

const SHARDS: u32 = 3;
const PER_SHARD: u32 = 2;
const TTL: i64 = 100;

fn record() -> JobRecord {
    let id = JobId::generate(0);
    let image =
        |index| v1::ImageInfo { index, status: ImageStatus::Pending.into(), ..Default::default() };
    let shard = |number: u32| Shard {
        id: id.derive::<ShardId>(&number.to_string()).to_string(),
        first: number * PER_SHARD,
        count: PER_SHARD,
        ..Default::default()
    };
    let mut record = JobRecord {
        job: v1::Job {
            job_id: id.to_string(),
            images: (0..SHARDS * PER_SHARD).map(image).collect(),
            ..Default::default()
        },
        shards: (0..SHARDS).map(shard).collect(),
        ..Default::default()
    };
    created(&mut record, 0);
    record
}

/// A transition of shard `shard` by the delivery `back` tokens before the newest.
#[derive(Debug, Clone)]
enum Op {
    Grant(usize),
    Renew(usize, u64),
    Commit(usize, u64, bool),
    Fail(usize, u64, bool),
    Expire(usize, u64, LostBy),
    Postpone(usize),
    GiveBack(usize, u64),
    Cancel,
    Wait(i64),
}

fn op() -> impl Strategy<Value = Op> {
    let shard = 0..SHARDS as usize;
    let back = 0u64..3;
    prop_oneof![
        6 => shard.clone().prop_map(Op::Grant),
        1 => (shard.clone(), back.clone()).prop_map(|(s, b)| Op::Renew(s, b)),
        4 => (shard.clone(), back.clone(), any::<bool>()).prop_map(|(s, b, w)| Op::Commit(s, b, w)),
        2 => (shard.clone(), back.clone(), any::<bool>()).prop_map(|(s, b, r)| Op::Fail(s, b, r)),
        2 => (shard.clone(), back.clone()).prop_map(|(s, b)| Op::Expire(s, b, LostBy::Worker)),
        1 => (shard.clone(), back.clone()).prop_map(|(s, b)| Op::Expire(s, b, LostBy::Coordinator)),
        1 => shard.clone().prop_map(Op::Postpone),
        1 => (shard, back).prop_map(|(s, b)| Op::GiveBack(s, b)),
        1 => Just(Op::Cancel),
        3 => (0i64..150).prop_map(Op::Wait),
    ]
}

fn transition(record: &JobRecord, op: &Op) -> Transition {
    let id = |shard: usize| record.shards[shard].key().expect("a valid id").shard;
    let key = |shard: usize, back: u64| {
        let newest = record.shards[shard].lease.token();
        LeaseKey { shard: id(shard), token: newest.saturating_sub(back) }
    };
    let failure = |retryable| Failure { reason: "it broke".into(), retryable, delay_ms: 10 };
    match *op {
        Op::Grant(shard) => Transition::Grant { shard: id(shard), worker: "w".into(), ttl_ms: TTL },
        Op::Renew(shard, back) => Transition::Renew { leases: vec![key(shard, back)], ttl_ms: TTL },
        Op::Commit(shard, back, withheld) => {
            let status = if withheld { ImageStatus::Withheld } else { ImageStatus::Released };
            let lease = key(shard, back);
            let image = |index| v1::ImageInfo {
                index,
                status: status.into(),
                image_sha256: lease.token.to_string(),
                ..Default::default()
            };
            let images = record.shards[shard].images().map(image).collect();
            Transition::Commit { lease, images, notices: Vec::new() }
        }
        Op::Fail(shard, back, retryable) => {
            Transition::Fail { lease: key(shard, back), failure: failure(retryable) }
        }
        Op::Expire(shard, back, by) => Transition::Expire { lease: key(shard, back), by },
        Op::Postpone(shard) => Transition::Postpone {
            shard: id(shard),
            obstacle: Obstacle { reason: "no node".to_owned(), delay_ms: 0, max_wait_ms: 50 },
        },
        Op::GiveBack(shard, back) => Transition::GiveBack { lease: key(shard, back) },
        Op::Cancel | Op::Wait(_) => Transition::Cancel { reason: "enough".into() },
    }
}

proptest! {
    /// Whatever happens in whatever order: an image that has ended never changes, every event has
    /// the next number, an ended job stays ended, and it ends exactly when its shards have.
    #[test]
    fn an_end_is_an_end_and_events_have_no_gaps(ops in prop::collection::vec(op(), 0..80)) {
        let mut record = record();
        let (mut now, mut sequence) = (0, record.last_sequence);
        let mut ended: BTreeMap<u32, v1::ImageInfo> = BTreeMap::new();
        for op in &ops {
            if let Op::Wait(ms) = op {
                now += ms;
                continue;
            }
            let mut next = record.clone();
            let Ok((_, events)) = apply(&mut next, &transition(&record, op), now) else {
                continue;
            };
            for event in &events {
                sequence += 1;
                prop_assert_eq!(event.sequence, sequence);
                if let Some(Event::Image(image)) = &event.event {
                    prop_assert_eq!(ended.insert(image.index, image.clone()), None);
                }
            }
            prop_assert!(!record.is_terminal() || (events.is_empty() && next.is_terminal()));
            prop_assert_eq!(next.last_sequence, sequence);
            record = next;
            for image in &record.job.images {
                prop_assert_eq!(image_ended(image.status()).then_some(image), ended.get(&image.index));
            }
            let over = record.shards.iter().all(|shard| shard.lease.is_terminal());
            prop_assert_eq!(record.is_terminal(), over);
            prop_assert_eq!(record.is_terminal(), ended.len() == record.job.images.len());
            if ended.values().any(|image| image.status() == ImageStatus::Failed) {
                prop_assert!(!record.job.reason.is_empty(), "a failure has a reason");
            }
        }
    }
}
