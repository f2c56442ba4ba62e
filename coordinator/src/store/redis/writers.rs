//! Transitions of jobs. Each is a record read, changed by [`crate::transition`], and written back if nobody has
//! replaced it meanwhile. This process makes a job's one after the other, so that it only ever competes
//! with other coordinators; those that come while one is written wait and are written together.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use fairlead_common::ids::JobId;
use fairlead_proto::v1::WatchJobResponse;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{
    base::Base,
    scripts::{Versioned, add_change},
};
use crate::{
    state::JobRecord,
    store::{Applied, StoreError},
    transition::{self, Effect, Transition},
};

/// How often a write is tried that others keep getting ahead of.
const CONFLICTS: u32 = 100;

/// Most transitions that are written together.
const TOGETHER: usize = 64;

type Answer = Result<Applied, StoreError>;

/// A transition that nobody has made yet.
#[derive(Debug)]
struct Wanted {
    transition: Transition,
    now: i64,
}

impl Wanted {
    /// Others end what a worker of theirs may hold; its own end it where it is known.
    fn is_told(&self) -> bool {
        matches!(self.transition, Transition::Cancel { .. } | Transition::Expire { .. })
    }
}

#[derive(Debug, Default)]
struct Queue(VecDeque<(Wanted, oneshot::Sender<Answer>)>);

impl Queue {
    /// Those at its head that can be written together.
    fn next(&mut self) -> (Vec<Wanted>, Vec<oneshot::Sender<Answer>>) {
        let is_told = self.0.front().is_some_and(|(wanted, _)| wanted.is_told());
        let alike = self.0.iter().take_while(|(wanted, _)| wanted.is_told() == is_told);
        let count = alike.count().min(TOGETHER);
        self.0.drain(..count).unzip()
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Writers {
    base: Arc<Base>,
    /// The jobs that something is written of now, with what waits for it.
    busy: Busy,
}

impl Writers {
    pub(super) fn new(base: Arc<Base>) -> Self {
        Self { base, busy: Arc::default() }
    }

    /// Makes one transition. Whoever drops the future does not keep it from being made.
    pub(super) async fn apply(&self, job: JobId, transition: Transition, now: i64) -> Answer {
        let (reply, answer) = oneshot::channel();
        let mut is_idle = false;
        {
            let mut busy = self.busy.lock();
            let queue = busy.entry(job).or_insert_with(|| {
                is_idle = true;
                Queue::default()
            });
            queue.0.push_back((Wanted { transition, now }, reply));
        }
        if is_idle {
            let claim = Claim { busy: Arc::clone(&self.busy), job, is_over: false };
            tokio::spawn(write_all(Arc::clone(&self.base), claim));
        }
        answer.await.unwrap_or_else(|_| {
            let problem = "its writer ended before: this coordinator stops, or the writer panicked";
            Err(StoreError::Away { what: "write a job", problem: problem.to_owned() })
        })
    }
}

type Busy = Arc<Mutex<HashMap<JobId, Queue>>>;

/// A job that is written: whatever ends the task, what still waits for it is answered.
struct Claim {
    busy: Busy,
    job: JobId,
    is_over: bool,
}

impl Claim {
    /// What can be written together now; the claim ends where there is nothing.
    fn next(&mut self) -> Option<(Vec<Wanted>, Vec<oneshot::Sender<Answer>>)> {
        let mut busy = self.busy.lock();
        let next = busy.get_mut(&self.job).map(Queue::next).unwrap_or_default();
        if next.0.is_empty() {
            busy.remove(&self.job);
            self.is_over = true;
            return None;
        }
        Some(next)
    }

    /// Everything that waits.
    fn all(&self) -> Vec<oneshot::Sender<Answer>> {
        let mut busy = self.busy.lock();
        let queue = busy.get_mut(&self.job).map(std::mem::take).unwrap_or_default();
        queue.0.into_iter().map(|(_, reply)| reply).collect()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.is_over {
            self.busy.lock().remove(&self.job);
        }
    }
}

/// Writes until nothing waits.
async fn write_all(base: Arc<Base>, mut claim: Claim) {
    let mut known = None;
    while let Some((wanted, mut replies)) = claim.next() {
        match write(&base, claim.job, &wanted, known.take()).await {
            Ok((written, answers)) => {
                known = Some(written);
                // Nobody may want to know any longer.
                replies.into_iter().zip(answers).for_each(|(to, answer)| drop(to.send(answer)));
            }
            Err(error) => {
                // Nobody waits for a store that is away once more for each who came before.
                if matches!(error, StoreError::Away { .. }) {
                    replies.extend(claim.all());
                }
                replies.into_iter().for_each(|to| drop(to.send(Err(error.clone()))));
            }
        }
    }
}

/// Makes transitions one after the other and writes what they come to; `known` is what this process wrote
/// last.
async fn write(
    base: &Base,
    job: JobId,
    wanted: &[Wanted],
    mut known: Option<Versioned>,
) -> Result<(Versioned, Vec<Answer>), StoreError> {
    let mut had_conflict = false;
    for _ in 0..CONFLICTS {
        let was_known = known.is_some();
        let before = match known.take() {
            Some(known) => known,
            None => base.read(job).await?.ok_or(StoreError::UnknownJob(job))?,
        };
        let Made { after, events, answers } = make(&before.record, wanted, had_conflict);
        let Some(after) = after else {
            // Nothing to write, so that nothing shows whether another coordinator was here meanwhile.
            if was_known {
                continue;
            }
            return Ok((before, answers));
        };
        let (first, is_told) = (&wanted[0], wanted[0].is_told());
        let written: Option<u64> = base
            .script("write a job", &base.scripts.write, first.now, |invocation| {
                invocation.arg(job.to_string()).arg(before.version);
                add_change(invocation, Some(&before), &after, is_told, &events);
            })
            .await?;
        if let Some(version) = written {
            return Ok((Versioned { version, record: after }, answers));
        }
        had_conflict = true;
    }
    let problem = format!("job {job} changed {CONFLICTS} times while it was written");
    Err(StoreError::Backend { what: "write a job", problem })
}

/// What transitions came to.
struct Made {
    /// The record, if it is to be written.
    after: Option<JobRecord>,
    events: Vec<WatchJobResponse>,
    /// One each.
    answers: Vec<Answer>,
}

/// Makes transitions of `before`. After a conflict a refusal may mean that the answer to an earlier try was
/// lost.
fn make(before: &JobRecord, wanted: &[Wanted], had_conflict: bool) -> Made {
    let (mut after, mut all_events) = (None::<JobRecord>, Vec::new());
    let mut answers = Vec::with_capacity(wanted.len());
    for Wanted { transition, now } in wanted {
        let present = after.as_ref().unwrap_or(before);
        let mut record = present.clone();
        let answer = match transition::apply(&mut record, transition, *now) {
            Ok((effect, events)) => {
                let applied =
                    Applied { record: record.clone(), effect, has_events: !events.is_empty() };
                after = Some(record);
                all_events.extend(events);
                Ok(applied)
            }
            Err(refusal) => match was_granted(present, transition, *now) {
                Some(effect) if had_conflict => {
                    Ok(Applied { record: present.clone(), effect, has_events: true })
                }
                _ => Err(refusal.into()),
            },
        };
        answers.push(answer);
    }
    Made { after, events: all_events, answers }
}

/// Whether the stored record already holds what this very grant asks for.
fn was_granted(record: &JobRecord, transition: &Transition, now: i64) -> Option<Effect> {
    let Transition::Grant { shard, worker, ttl_ms } = transition else { return None };
    let shard = record.shard(*shard)?;
    let lease = &shard.lease;
    let is_it = lease.holder() == worker && lease.expires_unix_ms() == now.saturating_add(*ttl_ms);
    is_it.then_some(Effect::Granted { lease: shard.key()?, attempt: lease.deliveries() })
}

#[cfg(test)]
mod tests {
    use fairlead_common::ids::ShardId;

    use super::*;
    use crate::{lease::LeaseKey, store::contract};

    fn wanted(transition: Transition) -> Wanted {
        Wanted { transition, now: 5 }
    }

    fn grant(shard: ShardId, worker: &str) -> Transition {
        Transition::Grant { shard, worker: worker.into(), ttl_ms: 100 }
    }

    #[test]
    fn what_is_refused_leaves_the_others_as_they_are() {
        let (_, record) = contract::job(2, 1);
        let [one, other] = [0, 1].map(|i: usize| record.shards[i].id.parse().expect("an id"));
        let stale = contract::fail(LeaseKey { shard: one, token: 3 });
        let all = [grant(one, "v"), grant(one, "w"), stale, grant(other, "w")].map(wanted);
        let Made { after, events, answers } = make(&record, &all, false);
        let is_ok: Vec<bool> = answers.iter().map(Result::is_ok).collect();
        assert_eq!(is_ok, [true, false, false, true]);
        let after = after.expect("something changed");
        for (shard, holder) in [(one, "v"), (other, "w")] {
            let shard = after.shard(shard).expect("it is there");
            assert_eq!((shard.lease.holder(), shard.lease.deliveries()), (holder, 1));
        }
        let last = answers[3].as_ref().expect("granted");
        assert_eq!(last.record, after);
        let first = answers[0].as_ref().expect("granted");
        assert_eq!(first.has_events || last.has_events, !events.is_empty());
    }

    #[test]
    fn where_all_is_refused_nothing_is_written() {
        let (_, record) = contract::job(1, 1);
        let shard = record.shards[0].id.parse().expect("an id");
        let stale = contract::fail(LeaseKey { shard, token: 3 });
        let Made { after, answers, .. } = make(&record, &[wanted(stale)], false);
        assert!(after.is_none() && answers[0].is_err());
    }

    #[test]
    fn a_grant_that_took_place_is_known_by_its_end() {
        let (_, record) = contract::job(1, 1);
        let shard = record.shards[0].id.parse().expect("an id");
        let first = [wanted(grant(shard, "w"))];
        let Made { after, answers, .. } = make(&record, &first, false);
        let after = after.expect("it was granted");
        // The answer was lost, and it is tried again.
        let again = make(&after, &first, true);
        assert!(again.after.is_none());
        let effects = [&answers[0], &again.answers[0]].map(|a| a.as_ref().map(|a| &a.effect).ok());
        assert_eq!(effects[0], effects[1]);
        let refused = |transition, had_conflict| {
            make(&after, &[wanted(transition)], had_conflict).answers[0].is_err()
        };
        assert!(refused(grant(shard, "w"), false), "nothing was lost: somebody else holds it");
        assert!(refused(grant(shard, "v"), true));
    }

    #[test]
    fn those_that_tell_others_are_written_apart() {
        let (_, record) = contract::job(3, 1);
        let grants = record.shards.iter().map(|s| grant(s.id.parse().expect("an id"), "w"));
        let cancel = Transition::Cancel { reason: String::new() };
        let mut queue = Queue::default();
        for transition in grants.chain([cancel]) {
            queue.0.push_back((wanted(transition), oneshot::channel().0));
        }
        let sizes: Vec<usize> = std::iter::from_fn(|| {
            let (next, replies) = queue.next();
            assert_eq!(next.len(), replies.len());
            Some(next.len()).filter(|&count| count > 0)
        })
        .collect();
        assert_eq!(sizes, [3, 1]);
    }
}
