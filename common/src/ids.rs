//! Identifiers: newtypes over UUIDs, so that a job is never taken for a shard.

use std::{fmt, str::FromStr};

use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// A fresh identifier, ordered by time of creation.
            pub fn generate() -> Self {
                Self(Uuid::now_v7())
            }

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

/// A short random name for a process that was not given one, e.g. `worker-3f9c21ab`.
pub fn process_name(kind: &str) -> String {
    let uuid = Uuid::new_v4().simple().to_string();
    format!("{kind}-{}", &uuid[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_derive_deterministically() {
        let job = JobId::generate();
        assert_eq!(job.to_string().parse::<JobId>().expect("an id parses"), job);
        let (a, b): (RecordId, RecordId) = (job.derive("0"), job.derive("0"));
        assert_eq!(a, b);
        assert_ne!(a, job.derive::<RecordId>("1"));
        assert!("kitchen".parse::<JobId>().is_err());
    }
}
