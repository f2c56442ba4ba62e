//! The contract of [`Store`], run against every backend.

use std::sync::Arc;

use fairlead_common::{
    ids::{JobId, ShardId},
    testing::RedisServer,
};
use fairlead_proto::v1::{self, ImageStatus, JobState, watch_job_response::Event};

use super::*;
use crate::{
    lease::{AfterFailure, Commit, Failure, LeaseKey, MAX_DELIVERIES, Obstacle},
    state::Shard,
    transition::LostBy,
};

pub(super) const TTL: i64 = 1_000;

pub(super) fn job(images: u32, per_shard: u32) -> (JobId, JobRecord) {
    let id = JobId::generate(0);
    let image = |index| v1::ImageInfo {
        index,
        record_id: format!("{id}-{index}"),
        status: ImageStatus::Pending.into(),
        ..Default::default()
    };
    let shard = |range: std::ops::Range<u32>| Shard {
        id: id.derive::<ShardId>(&range.start.to_string()).to_string(),
        first: range.start,
        count: range.end - range.start,
        ..Default::default()
    };
    let record = JobRecord {
        job: v1::Job {
            job_id: id.to_string(),
            images: (0..images).map(image).collect(),
            created_unix_ms: 5,
            ..Default::default()
        },
        model: v1::ModelInfo { name: format!("of {id}"), ..Default::default() },
        shards: crate::placement::split(images, per_shard).into_iter().map(shard).collect(),
        last_sequence: 0,
        traceparent: String::new(),
        tenant: String::new(),
        withheld_per_minute: 0,
    };
    (id, record)
}

/// The queue that only this job's shards are in.
pub(super) fn queue_of(job: JobId) -> QueueName {
    QueueName { model: format!("of {job}"), hash: String::new() }
}

pub(super) async fn take(store: &dyn Store, job: JobId, limit: usize, now: i64) -> Vec<ShardId> {
    let taken = store.take(&queue_of(job), limit, now).await.expect("index");
    taken.iter().map(|shard| shard.ids().expect("ids").1.shard).collect()
}

pub(super) fn new(record: JobRecord) -> NewJob {
    NewJob { record, key: None, max_queued: 100, quota: Quota::default() }
}

fn released(range: std::ops::Range<u32>) -> Vec<v1::ImageInfo> {
    let image =
        |index| v1::ImageInfo { index, status: ImageStatus::Released.into(), ..Default::default() };
    range.map(image).collect()
}

pub(crate) async fn stored(
    store: &dyn Store,
    images: u32,
    per_shard: u32,
) -> (JobId, Vec<ShardId>) {
    let (id, record) = job(images, per_shard);
    let Created::New(record) = store.create(new(record), 5).await.expect("it stores") else {
        panic!("the job is new")
    };
    (id, record.shards.iter().map(|shard| shard.id.parse().expect("an id")).collect())
}

pub(super) async fn grant(store: &dyn Store, job: JobId, shard: ShardId, now: i64) -> LeaseKey {
    let grant = Transition::Grant { shard, worker: "w".into(), ttl_ms: TTL };
    match store.apply(job, grant, now).await.expect("it is queued").effect {
        Effect::Granted { lease, .. } => lease,
        other => panic!("{other:?}"),
    }
}

pub(super) fn commit(lease: LeaseKey, range: std::ops::Range<u32>) -> Transition {
    Transition::Commit { lease, images: released(range), notices: vec!["long prompt".into()] }
}

pub(super) fn fail(lease: LeaseKey) -> Transition {
    let failure = Failure { reason: "it broke".into(), retryable: true, delay_ms: 0 };
    Transition::Fail { lease, failure }
}

async fn a_job_runs_to_its_end_with_events_in_order(store: &dyn Store) {
    let (id, shards) = stored(store, 3, 2).await;
    assert_eq!(shards.len(), 2);
    let first = grant(store, id, shards[0], 10).await;
    let second = grant(store, id, shards[1], 11).await;
    store.apply(id, commit(second, 1..3), 12).await.expect("the token is current");
    let done = store.apply(id, commit(first, 0..1), 13).await.expect("the token is current");
    assert_eq!(done.record.job.state(), JobState::Completed);
    assert_eq!(done.record.job.notices, ["long prompt"]);
    let events = store.events(id, 0, 100).await.expect("events");
    let sequences: Vec<_> = events.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, [1, 2, 3, 4, 5, 6]);
    let kinds: Vec<_> = events
        .iter()
        .map(|event| match event.event.as_ref().expect("an event") {
            Event::Job(job) => job.state().as_str_name().to_owned(),
            Event::Image(image) => format!("image {}", image.index),
            Event::Progress(_) => panic!("progress is not durable"),
        })
        .collect();
    let states = ["JOB_STATE_QUEUED", "JOB_STATE_RUNNING", "JOB_STATE_COMPLETED"];
    assert_eq!(kinds, [states[0], states[1], "image 1", "image 2", "image 0", states[2]]);
    assert_eq!(store.events(id, 4, 1).await.expect("events")[0].sequence, 5);
    let left = store.expired(i64::MAX, 100).await.expect("index");
    assert!(left.iter().all(|shard| shard.job_id != id.to_string()));
}

async fn only_the_newest_token_commits_and_again_is_fine(store: &dyn Store) {
    let (id, shards) = stored(store, 1, 1).await;
    let old = grant(store, id, shards[0], 10).await;
    store.apply(id, fail(old), 11).await.expect("the token is current");
    let newer = grant(store, id, shards[0], 12).await;
    assert!(newer.token > old.token);
    let before = store.get(id).await.expect("a job");
    let stale = store.apply(id, commit(old, 0..1), 13).await.expect_err("it is stale");
    assert!(matches!(stale, StoreError::Refused(Refusal::Lease(_))), "{stale}");
    assert_eq!(store.get(id).await.expect("a job"), before);
    for expected in [Commit::First, Commit::Again] {
        let done = store.apply(id, commit(newer, 0..1), 14).await.expect("the token is current");
        assert_eq!(done.effect, Effect::Committed(expected));
        assert_eq!(done.has_events, expected == Commit::First);
    }
}

async fn a_commit_must_end_each_image_of_its_shard(store: &dyn Store) {
    let (id, shards) = stored(store, 4, 2).await;
    let lease = grant(store, id, shards[0], 10).await;
    for range in [0..1, 0..3, 1..3, 2..4] {
        let refused = store.apply(id, commit(lease, range), 11).await.expect_err("incomplete");
        assert!(matches!(refused, StoreError::Refused(Refusal::Incomplete { .. })), "{refused}");
    }
    store.apply(id, commit(lease, 0..2), 12).await.expect("it is complete and still leased");
}

async fn a_cancelled_job_accepts_nothing_more(store: &dyn Store) {
    let (id, shards) = stored(store, 3, 1).await;
    let done = grant(store, id, shards[0], 10).await;
    store.apply(id, commit(done, 0..1), 11).await.expect("the token is current");
    let running = grant(store, id, shards[1], 12).await;
    let cancel = Transition::Cancel { reason: "the client asked".into() };
    let applied = store.apply(id, cancel.clone(), 13).await.expect("it cancels");
    assert_eq!(applied.effect, Effect::Cancelled { running: vec![running] });
    store.apply(id, commit(running, 1..2), 14).await.expect_err("it is too late");
    let again = store.apply(id, cancel, 15).await.expect("cancelling twice is fine");
    assert_eq!(again.effect, Effect::Cancelled { running: vec![] });
    let statuses: Vec<_> = again.record.job.images.iter().map(v1::ImageInfo::status).collect();
    use ImageStatus::{Cancelled, Released};
    assert_eq!(statuses, [Released, Cancelled, Cancelled]);
    assert_eq!(again.record.job.state(), JobState::Cancelled);
}

async fn a_poison_shard_fails_its_job_and_keeps_what_was_released(store: &dyn Store) {
    let (id, shards) = stored(store, 2, 1).await;
    let good = grant(store, id, shards[0], 10).await;
    store.apply(id, commit(good, 0..1), 11).await.expect("the token is current");
    for delivery in 1..=MAX_DELIVERIES {
        let now = 10 + i64::from(delivery);
        let lease = grant(store, id, shards[1], now).await;
        let applied = store.apply(id, fail(lease), now).await.expect("the token is current");
        let over = delivery == MAX_DELIVERIES;
        let after = if over { AfterFailure::GivenUp } else { AfterFailure::Requeued };
        assert_eq!(applied.effect, Effect::Ended(after));
    }
    let job = store.get(id).await.expect("a job").expect("a job").job;
    assert_eq!(job.state(), JobState::Failed);
    assert_eq!(job.reason, "image 1 failed after 5 attempt(s): it broke");
    let statuses: Vec<_> = job.images.iter().map(v1::ImageInfo::status).collect();
    assert_eq!(statuses, [ImageStatus::Released, ImageStatus::Failed]);
}

async fn the_queue_keeps_its_order_and_its_bound(store: &dyn Store) {
    let (id, shards) = stored(store, 3, 1).await;
    let held = grant(store, id, shards[2], 10).await;
    store.apply(id, fail(held), 11).await.expect("the token is current");
    let put_off = Obstacle { reason: "no node".into(), delay_ms: 100, max_wait_ms: 1_000 };
    let postpone = Transition::Postpone { shard: shards[0], obstacle: put_off };
    store.apply(id, postpone, 11).await.expect("it is queued");
    let next_due = store.backlog(11).await.expect("index").next_due_unix_ms;
    assert_eq!(next_due, Some(111));
    let taken = take(store, id, 10, 11).await;
    assert_eq!(taken, [shards[2], shards[1]], "a retry comes first, one put off not yet");
    let later = 111 + i64::try_from(CLAIM.as_millis()).expect("it is short");
    assert_eq!(take(store, id, 1, later).await.len(), 1);
    let backlog = store.backlog(12).await.expect("index");
    let queued: usize = backlog.queued.values().sum();
    assert_eq!(backlog.queued.get(&queue_of(id)), Some(&3));
    let (_, record) = job(2, 1);
    let full = NewJob { max_queued: queued + 1, ..new(record.clone()) };
    let answer = store.create(full, 12).await.expect("it answers");
    assert_eq!(answer, Created::Full(Full::Queue));
    let fits = NewJob { max_queued: queued + 2, ..new(record) };
    assert!(matches!(store.create(fits, 12).await.expect("it answers"), Created::New(_)));
}

async fn renewals_expiry_and_losses(store: &dyn Store) {
    let (id, shards) = stored(store, 2, 1).await;
    let (a, b) = (grant(store, id, shards[0], 0).await, grant(store, id, shards[1], 0).await);
    let stale = LeaseKey { token: a.token + 1, ..a };
    let renew = Transition::Renew { leases: vec![a, stale], ttl_ms: TTL };
    let renewed = store.apply(id, renew, 600).await.expect("it answers").effect;
    assert_eq!(renewed, Effect::Renewed { lost: vec![stale] });
    let expire = |lease, by| Transition::Expire { lease, by };
    for by in [LostBy::Worker, LostBy::Coordinator] {
        store.apply(id, expire(a, by), 1_000).await.expect_err("it was renewed");
    }
    let worker = store.apply(id, expire(b, LostBy::Worker), 1_000).await.expect("it has expired");
    assert_eq!(worker.effect, Effect::Ended(AfterFailure::Requeued));
    let b = grant(store, id, shards[1], 1_000).await;
    let lost = expire(b, LostBy::Coordinator);
    let lost = store.apply(id, lost, 2_000).await.expect("it has expired");
    assert_eq!(lost.effect, Effect::GivenBack);
    let deliveries = |shard: usize| lost.record.shards[shard].lease.deliveries();
    assert_eq!((deliveries(0), deliveries(1)), (1, 1), "of the two the worker's alone counts");
    let ended = store.expired(1_599, 100).await.expect("index");
    assert!(ended.iter().all(|shard| shard.job_id != id.to_string()), "one lease, until 1600");
    let ended = store.expired(1_600, 100).await.expect("index");
    let mine: Vec<_> = ended
        .iter()
        .filter(|shard| shard.job_id == id.to_string())
        .map(|shard| (shard.ids().expect("ids").1, shard.expires_unix_ms, shard.holder.as_str()))
        .collect();
    assert_eq!(mine, [(a, 1_600, "w")]);
    store.apply(id, Transition::GiveBack { lease: a }, 1_100).await.expect("it is current");
    assert!(grant(store, id, shards[0], 1_100).await.token > a.token);
}

async fn what_was_noted_by_a_clock_that_was_ahead_stands_in_no_ones_way(store: &dyn Store) {
    const YEAR: i64 = 365 * 24 * 3_600_000;
    let (id, shards) = stored(store, 2, 1).await;
    let lease = grant(store, id, shards[0], YEAR).await;
    let put_off = Obstacle { reason: "no node".into(), delay_ms: 100, max_wait_ms: 1_000 };
    let postpone = Transition::Postpone { shard: shards[1], obstacle: put_off };
    store.apply(id, postpone, YEAR).await.expect("it is queued");
    assert_eq!(take(store, id, 10, 50).await, shards[1..], "it is due");
    let ended = store.expired(50, 1_000).await.expect("index");
    let mine = ended.iter().find(|shard| shard.job_id == id.to_string()).expect("it has ended");
    assert_eq!(mine.ids().expect("ids").1, lease);
    let expire = Transition::Expire { lease, by: LostBy::Worker };
    store.apply(id, expire, 50).await.expect("nobody means a year");
    let member = Member { id: "ahead".into(), ..Member::default() };
    store.join(member.clone(), YEAR, 100).await.expect("it joins");
    let roster = store.roster(None, 0).await.expect("it answers").expect("it is new");
    assert!(roster.members.iter().any(|member| member.id == "ahead"), "at 0 nobody is gone");
    let roster = store.roster(None, 50).await.expect("it answers").expect("it is new");
    assert!(roster.members.iter().all(|member| member.id != "ahead"));
    assert_eq!(store.keep(&[member.key()], 50, 100).await.expect("it answers").len(), 1);
    let cancel = Transition::Cancel { reason: String::new() };
    store.apply(id, cancel, 60).await.expect("it cancels");
}

async fn keys_shards_and_records_lead_to_their_job(store: &dyn Store) {
    let (id, record) = job(2, 1);
    let key = format!("key-of-{id}");
    let with_key = NewJob { key: Some((key.clone(), vec![7])), ..new(record.clone()) };
    assert!(matches!(store.create(with_key, 1).await.expect("it stores"), Created::New(_)));
    let second = NewJob { key: Some((key.clone(), vec![8])), ..new(job(1, 1).1) };
    let Created::Existing(found) = store.create(second, 2).await.expect("it answers") else {
        panic!("the key is taken")
    };
    assert_eq!((found.job_id, found.body_hash), (id.to_string(), vec![7]));
    let image = &record.job.images[1];
    let found = store.find(Lookup::Record(&image.record_id)).await.expect("it answers");
    assert_eq!(found.map(|found| (found.job_id, found.index)), Some((id.to_string(), 1)));
    let found = store.find(Lookup::Shard(&record.shards[0].id)).await.expect("it answers");
    assert_eq!(found.map(|found| found.job_id), Some(id.to_string()));
    assert_eq!(store.find(Lookup::Key("", "another")).await.expect("it answers"), None);
}

async fn lists_are_newest_first_and_page(store: &dyn Store) {
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(stored(store, 1, 1).await.0.to_string());
    }
    let names = |records: Vec<JobRecord>| -> Vec<_> {
        records.into_iter().map(|record| record.job.job_id).collect()
    };
    let first = names(store.list(None, None, 2).await.expect("a page"));
    assert_eq!(first, [ids[2].clone(), ids[1].clone()]);
    let last = first[1].parse().expect("an id");
    assert_eq!(names(store.list(None, Some(last), 1).await.expect("a page")), [ids[0].clone()]);
}

async fn old_jobs_are_forgotten_with_everything_about_them(store: &dyn Store) {
    let (id, record) = job(1, 1);
    let key = format!("key-of-{id}");
    let new = NewJob { key: Some((key.clone(), vec![])), ..new(record) };
    store.create(new, 5).await.expect("it stores");
    let ended = async |before, limit| -> Vec<JobRecord> {
        let ended = store.ended(before, limit).await.expect("it answers");
        ended.into_iter().filter(|record| record.job.job_id == id.to_string()).collect()
    };
    assert!(ended(u64::MAX, 1_000).await.is_empty(), "it has not ended");
    let age = store.age(None).await.expect("it has one");
    let second = Some((age, Duration::from_secs(1)));
    assert_eq!(store.age(second).await.expect("it grows"), age + 1_000);
    assert_eq!(store.age(second).await.expect("it answers"), age + 1_000, "another has added it");
    let cancel = Transition::Cancel { reason: String::new() };
    store
        .apply(id, cancel.clone(), i64::MAX / 2)
        .await
        .expect("it cancels, whatever the clock says");
    store.apply(id, cancel, 6).await.expect("again is fine");
    assert!(ended(age + 1_000, 1_000).await.is_empty(), "not old enough");
    assert!(ended(age + 1_001, 0).await.is_empty(), "none was asked for");
    let old = ended(age + 1_001, 1_000).await;
    assert_eq!(old.len(), 1);
    store.forget(old.clone()).await.expect("it forgets");
    store.forget(old).await.expect("again is fine");
    assert!(ended(u64::MAX, 1_000).await.is_empty());
    assert_eq!(store.get(id).await.expect("it answers"), None);
    assert!(store.events(id, 0, 10).await.expect("it answers").is_empty());
    assert_eq!(store.find(Lookup::Key("", &key)).await.expect("it answers"), None);
}

async fn members_stay_by_renewing_and_what_they_had_is_known(store: &dyn Store) {
    let member = |id: &str, registration: &str| {
        let concept =
            v1::ConceptRef { name: "axe".into(), energy: id.into(), ..Default::default() };
        let info = v1::ConceptInfo { concept: Some(concept), ..Default::default() };
        let node = v1::NodeInfo { concepts: vec![info], ..Default::default() };
        let model = v1::ModelInfo { name: format!("sd of {id}"), ..Default::default() };
        Member {
            id: id.into(),
            registration: registration.into(),
            node: Some(node),
            models: vec![model],
            ..Default::default()
        }
    };
    let (a, old, b) = (member("a", "1"), member("b", "old"), member("b", "new"));
    for member in [&a, &old, &b] {
        store.join(member.clone(), 0, 100).await.expect("it joins");
    }
    let keys = [a.key(), old.key(), b.key()];
    assert_eq!(store.keep(&keys, 50, 100).await.expect("it answers"), [old.key()]);
    let roster = store.roster(None, 149).await.expect("it answers").expect("it is new");
    let names = |roster: &Roster| -> Vec<_> {
        let mut names: Vec<_> =
            roster.members.iter().map(|m| (m.id.clone(), m.registration.clone())).collect();
        names.sort();
        names
    };
    assert_eq!(names(&roster), [("a".into(), "1".into()), ("b".into(), "new".into())]);
    let known = Some(roster.version);
    assert_eq!(store.roster(known, 149).await.expect("it answers"), None, "nothing has changed");
    assert!(!store.leave(&old.key()).await.expect("it answers"));
    assert!(store.leave(&b.key()).await.expect("it answers"));
    let roster = store.roster(known, 149).await.expect("it answers").expect("one has left");
    assert_eq!(names(&roster), [("a".into(), "1".into())]);
    let roster = store.roster(Some(roster.version), 150).await.expect("it answers").expect("time");
    assert!(roster.members.is_empty());
    let probe = |energy: &str| Probe { concept: "axe".into(), energy: energy.into() };
    assert_eq!(roster.seen.probes, [probe("a"), probe("b")].into());
    assert_eq!(roster.seen.models, ["sd of a".to_owned(), "sd of b".to_owned()].into());
    let energies = store.retire("axe").await.expect("it answers");
    assert_eq!(energies, ["a".to_owned(), "b".to_owned()].into());
    let roster = store.roster(Some(roster.version), 150).await.expect("it answers").expect("news");
    assert!(roster.seen.probes.is_empty() && !roster.seen.models.is_empty());
    assert!(store.retire("axe").await.expect("it answers").is_empty());
}

async fn tenants_take_turns(store: &dyn Store) {
    let queue = queue_of(JobId::generate(0));
    let mut shards = Vec::new();
    for tenant in ["many", "few"] {
        let (_, mut record) = job(3, 1);
        tenant.clone_into(&mut record.tenant);
        queue.model.clone_into(&mut record.model.name);
        shards.extend(record.shards.iter().map(|shard| shard.id.clone()));
        store.create(new(record), 5).await.expect("it stores");
    }
    let taken = store.take(&queue, 5, 10).await.expect("index");
    let places: Vec<_> = taken
        .iter()
        .map(|t| shards.iter().position(|id| *id == t.shard_id).expect("mine"))
        .collect();
    assert_eq!(places, [3, 0, 4, 1, 5], "in turn, each in its order");
}

async fn a_tenants_jobs_keys_and_bounds_are_its_own(store: &dyn Store) {
    let of = |tenant: &str, images| {
        let mut record = job(images, 1).1;
        tenant.clone_into(&mut record.tenant);
        record
    };
    let (first, second) = (of("one", 2), of("two", 1));
    let key = Some(("same".to_owned(), vec![1]));
    for record in [&first, &second] {
        let new = NewJob { key: key.clone(), ..new(record.clone()) };
        let created = store.create(new, 5).await.expect("it stores");
        assert!(matches!(created, Created::New(_)), "another tenant's key is another key");
    }
    let found = store.find(Lookup::Key("two", "same")).await.expect("it answers");
    assert_eq!(found.map(|found| found.job_id), Some(second.job.job_id.clone()));
    let listed = store.list(Some("one"), None, 10).await.expect("a page");
    assert_eq!(listed.iter().map(|record| &record.tenant).collect::<Vec<_>>(), ["one"]);

    let quota = Quota { max_queued: Some(3), ..Quota::default() };
    let create = async |tenant, images, quota, now| {
        let new = NewJob { quota, ..new(of(tenant, images)) };
        store.create(new, now).await.expect("it answers")
    };
    assert_eq!(create("one", 2, quota, 5).await, Created::Full(Full::Tenant));
    assert!(matches!(create("one", 1, quota, 5).await, Created::New(_)));
    assert!(matches!(create("two", 2, quota, 5).await, Created::New(_)), "its own two and one");
    let cancel = Transition::Cancel { reason: String::new() };
    store.apply(first.id().expect("an id"), cancel, 6).await.expect("it cancels");
    assert!(matches!(create("one", 2, quota, 7).await, Created::New(_)), "there is room again");

    let quota = Quota { images_per_minute: Some(4), ..Quota::default() };
    let start = 1_000_000_000_000;
    assert!(matches!(create("one", 3, quota, start).await, Created::New(_)));
    let wait = |wait_ms| Created::Full(Full::Rate { wait_ms });
    assert_eq!(create("one", 2, quota, start).await, wait(15_000));
    assert!(
        matches!(create("one", 1, quota, start).await, Created::New(_)),
        "refusals cost nothing"
    );
    assert_eq!(create("one", 64, quota, start + 30_000).await, wait(30_000), "until it is whole");
    assert!(matches!(create("two", 4, quota, start).await, Created::New(_)), "its own allowance");
    assert!(matches!(create("one", 2, quota, start + 30_000).await, Created::New(_)));

    let quota = Quota { withheld_per_minute: Some(4), ..Quota::default() };
    let charge = async |images, now| {
        let charge = Charge { tenant: "one".into(), images, per_minute: 4 };
        store.charge(charge, now).await.expect("it answers")
    };
    let start = start + 600_000;
    assert!(!charge(3, start).await, "one is left");
    assert!(matches!(create("one", 1, quota, start).await, Created::New(_)));
    assert!(charge(2, start).await, "the bound is reached");
    assert!(!charge(1, start).await, "it was before");
    let withheld = Created::Full(Full::Withheld { wait_ms: 45_000 });
    assert_eq!(create("one", 1, quota, start).await, withheld);
    assert!(matches!(create("two", 1, quota, start).await, Created::New(_)), "its own allowance");
    assert!(matches!(create("one", 1, Quota::default(), start).await, Created::New(_)));
    assert!(matches!(create("one", 1, quota, start + 45_000).await, Created::New(_)));
}

async fn concurrent_grants_have_one_winner(store: Arc<dyn Store>) {
    let (id, shards) = stored(store.as_ref(), 1, 1).await;
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..8 {
        let (store, shard) = (Arc::clone(&store), shards[0]);
        tasks.spawn(async move {
            let grant = Transition::Grant { shard, worker: format!("w{worker}"), ttl_ms: TTL };
            store.apply(id, grant, 10).await.is_ok()
        });
    }
    let won = tasks.join_all().await.into_iter().filter(|won| *won).count();
    assert_eq!(won, 1);
}

async fn all(store: Arc<dyn Store>) {
    let backend = store.as_ref();
    a_job_runs_to_its_end_with_events_in_order(backend).await;
    only_the_newest_token_commits_and_again_is_fine(backend).await;
    a_commit_must_end_each_image_of_its_shard(backend).await;
    a_cancelled_job_accepts_nothing_more(backend).await;
    a_poison_shard_fails_its_job_and_keeps_what_was_released(backend).await;
    the_queue_keeps_its_order_and_its_bound(backend).await;
    renewals_expiry_and_losses(backend).await;
    what_was_noted_by_a_clock_that_was_ahead_stands_in_no_ones_way(backend).await;
    keys_shards_and_records_lead_to_their_job(backend).await;
    lists_are_newest_first_and_page(backend).await;
    old_jobs_are_forgotten_with_everything_about_them(backend).await;
    members_stay_by_renewing_and_what_they_had_is_known(backend).await;
    tenants_take_turns(backend).await;
    a_tenants_jobs_keys_and_bounds_are_its_own(backend).await;
    let unknown = JobId::generate(0);
    let cancel = Transition::Cancel { reason: String::new() };
    let error = backend.apply(unknown, cancel, 0).await.expect_err("there is no such job");
    assert!(matches!(error, StoreError::UnknownJob(id) if id == unknown));
    concurrent_grants_have_one_winner(store).await;
}

#[tokio::test]
async fn the_memory_store_keeps_the_contract() {
    all(Arc::new(MemoryStore::default())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_redb_store_keeps_the_contract() {
    let dir = tempfile::tempdir().expect("a directory");
    all(Arc::new(RedbStore::open(&dir.path().join("jobs.redb")).expect("it opens"))).await;
}

#[tokio::test]
async fn redb_keeps_everything_over_a_restart_and_has_one_holder() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("jobs.redb");
    let store = RedbStore::open(&path).expect("it opens");
    let (id, shards) = stored(&store, 2, 1).await;
    let lease = grant(&store, id, shards[0], 10).await;
    let before = store.get(id).await.expect("a job");
    let model = v1::ModelInfo { name: "sd".into(), ..Default::default() };
    let worker = Member { models: vec![model], ..Default::default() };
    store.join(worker, 10, 1_000).await.expect("it joins");
    let second = RedbStore::open(&path).expect_err("it is held").to_string();
    assert!(second.contains("another coordinator"), "{second}");
    drop(store);
    let store = RedbStore::open(&path).expect("it opens again");
    assert_eq!(store.get(id).await.expect("a job"), before);
    store.apply(id, commit(lease, 0..1), 12).await.expect("the token survived");
    assert_eq!(take(&store, id, 10, 12).await, [shards[1]]);
    let roster = store.roster(None, 12).await.expect("it answers").expect("it is new");
    assert!(roster.members.is_empty(), "members join again");
    assert_eq!(roster.seen.models, ["sd".to_owned()].into(), "what they had is known");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_redis_store_keeps_the_contract() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(dir.path());
    all(Arc::new(RedisStore::new(&server.url(), "fairlead").expect("an address"))).await;
}
