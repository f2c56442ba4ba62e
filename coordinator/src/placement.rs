//! How a job becomes shards and which worker gets which shard. Pure.

use std::ops::Range;

/// Splits `n` images into consecutive shards of at most `max` images, as even as can be.
pub(crate) fn split(n: u32, max: u32) -> Vec<Range<u32>> {
    let shards = n.div_ceil(max.max(1));
    let bound = |i: u32| {
        // In u64: n * i may exceed 32 bits. The quotient is at most n.
        let images = u64::from(n) * u64::from(i) / u64::from(shards.max(1));
        u32::try_from(images).unwrap_or(n)
    };
    (0..shards).map(|i| bound(i)..bound(i + 1)).collect()
}

/// An attached worker that has the generator in question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Its connection.
    pub(crate) connection: u64,
    /// Shards it wants to hold at once.
    pub(crate) capacity: usize,
    /// Shards it holds.
    pub(crate) leases: usize,
}

impl Candidate {
    /// Shards it would take now.
    pub(crate) fn room(&self) -> usize {
        self.capacity.saturating_sub(self.leases)
    }
}

/// The connections that get up to `shards` shards of one generator, first things first: each goes to
/// the worker with the fewest leases among those with room. A worker makes a shard larger than its
/// batch in several batches.
pub(crate) fn place(shards: usize, workers: &[Candidate]) -> Vec<u64> {
    let mut workers = workers.to_vec();
    let mut placed = Vec::new();
    while placed.len() < shards {
        let free = workers.iter_mut().filter(|worker| worker.room() > 0);
        let Some(worker) = free.min_by_key(|worker| worker.leases) else { break };
        worker.leases += 1;
        placed.push(worker.connection);
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_split_covers_each_image_once(n in 0u32..10_000, max in 0u32..100) {
            let shards = split(n, max);
            let images: Vec<u32> = shards.iter().cloned().flatten().collect();
            prop_assert_eq!(images, (0..n).collect::<Vec<_>>());
            let sizes: Vec<u32> = shards.iter().map(|shard| shard.end - shard.start).collect();
            if let (Some(least), Some(most)) = (sizes.iter().min(), sizes.iter().max()) {
                prop_assert!(*least > 0 && *most <= max.max(1) && most - least <= 1);
            }
        }

        #[test]
        fn placement_respects_capacity_and_leaves_no_room_unused(
            shards in 0usize..20,
            workers in prop::collection::vec((0usize..4, 0usize..4), 0..6),
        ) {
            let workers: Vec<_> = (0..)
                .zip(workers)
                .map(|(connection, (capacity, leases))| Candidate { connection, capacity, leases })
                .collect();
            let placed = place(shards, &workers);
            let room: usize = workers.iter().map(Candidate::room).sum();
            prop_assert_eq!(placed.len(), shards.min(room));
            for worker in &workers {
                let got = placed.iter().filter(|&&connection| connection == worker.connection).count();
                prop_assert!(got <= worker.room());
            }
        }
    }

    #[test]
    fn the_least_busy_worker_comes_first() {
        let worker = |connection, leases| Candidate { connection, capacity: 4, leases };
        assert_eq!(place(3, &[worker(7, 2), worker(9, 0)]), [9, 9, 7]);
    }
}
