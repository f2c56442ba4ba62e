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

/// A queued shard, in queue order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Waiting<'a> {
    /// Name and hash of the generator it needs.
    pub(crate) model: (&'a str, &'a str),
}

/// An attached worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate<'a> {
    /// Name and hash of each of its generators.
    pub(crate) models: Vec<(&'a str, &'a str)>,
    /// Shards it wants to hold at once.
    pub(crate) capacity: usize,
    /// Shards it holds.
    pub(crate) leases: usize,
}

impl Candidate<'_> {
    fn can_make(&self, shard: &Waiting<'_>) -> bool {
        self.models.contains(&shard.model)
    }
}

/// Pairs of (index in `queue`, index in `workers`): oldest shard first, each to the worker with
/// the fewest leases among those that have its model and room. A worker makes a shard larger than its
/// batch in several batches.
pub(crate) fn place(queue: &[Waiting<'_>], workers: &[Candidate<'_>]) -> Vec<(usize, usize)> {
    let mut leases: Vec<usize> = workers.iter().map(|worker| worker.leases).collect();
    let mut placed = Vec::new();
    for (shard, waiting) in queue.iter().enumerate() {
        let fits = |&worker: &usize| {
            leases[worker] < workers[worker].capacity && workers[worker].can_make(waiting)
        };
        let best = (0..workers.len()).filter(fits).min_by_key(|&worker| leases[worker]);
        if let Some(worker) = best {
            leases[worker] += 1;
            placed.push((shard, worker));
        }
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MODELS: [(&str, &str); 3] = [("sd", "1"), ("sd", "2"), ("sd3", "1")];

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
        fn placement_respects_model_and_capacity_and_leaves_nothing_that_fits(
            queue in prop::collection::vec(0usize..3, 0..20),
            workers in prop::collection::vec(
                (prop::collection::vec(0usize..3, 0..3), 0usize..4, 0usize..4),
                0..6,
            ),
        ) {
            let queue: Vec<_> = queue
                .iter()
                .map(|&model| Waiting { model: MODELS[model] })
                .collect();
            let workers: Vec<_> = workers.into_iter().map(|(models, capacity, leases)| Candidate {
                models: models.into_iter().map(|model| MODELS[model]).collect(),
                capacity,
                leases,
            }).collect();
            let placed = place(&queue, &workers);
            let mut leases: Vec<_> = workers.iter().map(|worker| worker.leases).collect();
            let mut seen = std::collections::BTreeSet::new();
            for &(shard, worker) in &placed {
                prop_assert!(seen.insert(shard), "shard {} placed twice", shard);
                prop_assert!(workers[worker].can_make(&queue[shard]));
                leases[worker] += 1;
                prop_assert!(leases[worker] <= workers[worker].capacity);
            }
            for (shard, waiting) in queue.iter().enumerate() {
                let room = workers.iter().zip(&leases)
                    .any(|(worker, &held)| held < worker.capacity && worker.can_make(waiting));
                prop_assert!(seen.contains(&shard) || !room, "shard {} was left", shard);
            }
        }
    }

    #[test]
    fn the_least_busy_worker_comes_first() {
        let worker = |leases| Candidate { models: vec![MODELS[0]], capacity: 4, leases };
        let queue = vec![Waiting { model: MODELS[0] }; 3];
        assert_eq!(place(&queue, &[worker(2), worker(0)]), [(0, 1), (1, 1), (2, 0)]);
    }
}
