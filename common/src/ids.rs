//! Identifiers: newtypes over UUIDs, so that a job is never taken for a shard.

use std::{fmt, str::FromStr, sync::Mutex};

use uuid::{ContextV7, Timestamp, Uuid};

/// Keeps jobs of one millisecond, and of a clock that was set back, in order.
static NEWEST: Mutex<ContextV7> = Mutex::new(ContextV7::new());

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// The identifier that belongs to `name` within this one; the same on every call.
            pub fn derive<T: From<Uuid>>(&self, name: &str) -> T {
                T::from(Uuid::new_v5(&self.0, name.as_bytes()))
            }
        }

        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

id!(
    /// A client's request for images.
    JobId
);
id!(
    /// Part of a job that one worker makes at once.
    ShardId
);
id!(
    /// The safety record of one image.
    RecordId
);

impl JobId {
    /// A fresh identifier, ordered by `unix_ms`, the time of creation; those of one process by creation.
    pub fn generate(unix_ms: i64) -> Self {
        let ms = u64::try_from(unix_ms).unwrap_or_default();
        let subsec_nanos = (ms % 1_000) as u32 * 1_000_000;
        Self(Uuid::new_v7(Timestamp::from_unix(&NEWEST, ms / 1_000, subsec_nanos)))
    }
}

/// A short random name for a process that was not given one, e.g. `worker-3f9c21ab`.
pub fn process_name(kind: &str) -> String {
    format!("{kind}-{}", short())
}

/// The same for one of several processes that share the certificate of `name`, e.g. `worker-1/3f9c21ab`.
pub fn process_part(name: &str) -> String {
    format!("{name}/{}", short())
}

fn short() -> String {
    let uuid = Uuid::new_v4().simple().to_string();
    uuid[..8].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_derive_deterministically() {
        let job = JobId::generate(7);
        assert_eq!(job.to_string().parse::<JobId>().expect("an id parses"), job);
        let (a, b): (RecordId, RecordId) = (job.derive("0"), job.derive("0"));
        assert_eq!(a, b);
        assert_ne!(a, job.derive::<RecordId>("1"));
        assert!("kitchen".parse::<JobId>().is_err());
    }

    #[test]
    fn jobs_are_ordered_by_creation() {
        let jobs = [7, 7, 6, 2_000_000].map(JobId::generate);
        assert!(jobs.is_sorted(), "{jobs:?}");
    }
}
