//! The scripts, and their arguments as `prelude.lua` reads them.

use std::collections::BTreeMap;

use ::redis::{Script, ScriptInvocation};
use fairlead_proto::v1::WatchJobResponse;
use prost::Message;

use crate::{
    state::{ActiveShard, JobRecord, QueueName},
    store::MemberKey,
};

#[derive(Debug)]
pub(super) struct Scripts {
    pub(super) create: Script,
    pub(super) charge: Script,
    pub(super) write: Script,
    pub(super) take: Script,
    pub(super) backlog: Script,
    pub(super) expired: Script,
    pub(super) forget: Script,
    pub(super) mend: Script,
    pub(super) members: Script,
    pub(super) age: Script,
}

impl Scripts {
    pub(super) fn new() -> Self {
        let script = |body| Script::new(&[include_str!("prelude.lua"), body].concat());
        Self {
            create: script(include_str!("create.lua")),
            charge: script(include_str!("charge.lua")),
            write: script(include_str!("write.lua")),
            take: script(include_str!("take.lua")),
            backlog: script(include_str!("backlog.lua")),
            expired: script(include_str!("expired.lua")),
            forget: script(include_str!("forget.lua")),
            mend: script(include_str!("mend.lua")),
            members: script(include_str!("members.lua")),
            age: script(include_str!("age.lua")),
        }
    }
}

/// A record and the version it was read at.
pub(super) struct Versioned {
    pub(super) version: u64,
    pub(super) record: JobRecord,
}

pub(super) fn queue_key(QueueName { model, hash }: &QueueName) -> String {
    format!("{model}@{hash}")
}

pub(super) fn queue_name(key: &str) -> QueueName {
    let (model, hash) = key.rsplit_once('@').unwrap_or((key, ""));
    QueueName { model: model.to_owned(), hash: hash.to_owned() }
}

pub(super) fn member_key(MemberKey { kind, id, .. }: &MemberKey) -> String {
    format!("{}|{id}", i32::from(*kind))
}

/// Adds the arguments that `shards` in prelude.lua reads.
pub(super) fn add_shards(invocation: &mut ScriptInvocation<'_>, shards: &[ActiveShard]) {
    invocation.arg(shards.len());
    for shard in shards {
        invocation
            .arg(&shard.shard_id)
            .arg(queue_key(&shard.queue))
            .arg(shard.lane.class)
            .arg(&shard.lane.tenant)
            .arg(shard.work)
            .arg(u8::from(shard.leased))
            .arg(shard.expires_unix_ms)
            .arg(shard.not_before_unix_ms)
            .arg(shard.encode_to_vec());
    }
}

/// Adds the arguments that `write` in prelude.lua reads: what makes `after` of `before`, and whether others
/// are `told` of leases that end.
pub(super) fn add_change(
    invocation: &mut ScriptInvocation<'_>,
    before: Option<&Versioned>,
    after: &JobRecord,
    told: bool,
    events: &[WatchJobResponse],
) {
    let was_open = before.is_none_or(|before| !before.record.is_terminal());
    let has_ended = was_open && after.is_terminal();
    invocation.arg(after.encode_to_vec()).arg(u8::from(has_ended));
    invocation.arg(u8::from(told)).arg(events.len());
    for event in events {
        invocation.arg(event.sequence).arg(event.encode_to_vec());
    }
    let old: BTreeMap<String, ActiveShard> = before
        .into_iter()
        .flat_map(|before| before.record.active())
        .map(|shard| (shard.shard_id.clone(), shard))
        .collect();
    let changed: Vec<ActiveShard> =
        after.active().filter(|shard| old.get(&shard.shard_id) != Some(shard)).collect();
    add_shards(invocation, &changed);
    let ended = after.shards.iter().filter(|shard| shard.lease.is_terminal());
    let gone: Vec<&ActiveShard> = ended.filter_map(|shard| old.get(&shard.id)).collect();
    invocation.arg(gone.len());
    for shard in gone {
        invocation.arg(&shard.shard_id).arg(queue_key(&shard.queue)).arg(&shard.lane.tenant);
    }
}
