//! How many images a tenant may ask for in a minute, and how many of them may be withheld: the generic cell
//! rate algorithm (ITU-T I.371). What is left of an allowance follows from one number, the time at which it
//! is whole again.

use std::collections::BTreeMap;

use super::{Charge, Full};
use crate::{clock::is_beyond, state::JobRecord, tenants::Quota};

/// The time that an allowance is for, milliseconds.
const MINUTE_MS: u64 = 60_000;

/// The allowances of all tenants.
#[derive(Debug, Default)]
pub(super) struct Rates {
    admitted: Allowances,
    withheld: Allowances,
}

impl Rates {
    /// Takes the images of a job from its tenant's allowance, if that has a bound, unless too many of its
    /// images were withheld.
    pub(super) fn admit(&mut self, job: &JobRecord, quota: Quota, now: i64) -> Result<(), Full> {
        if let Some(per_minute) = quota.withheld_per_minute {
            let wait = self.withheld.wait(&job.tenant, per_minute, now);
            wait.map_err(|wait_ms| Full::Withheld { wait_ms })?;
        }
        let Some(per_minute) = quota.images_per_minute else { return Ok(()) };
        self.admitted
            .take(&job.tenant, job.job.images.len(), per_minute, now)
            .map_err(|wait_ms| Full::Rate { wait_ms })
    }

    /// Takes withheld images from their tenant's allowance, also beyond it; whether that kept the tenant out
    /// that was not before.
    pub(super) fn charge(
        &mut self,
        Charge { tenant, images, per_minute }: &Charge,
        now: i64,
    ) -> bool {
        let wait = |withheld: &Allowances| withheld.wait(tenant, *per_minute, now);
        let was_in = wait(&self.withheld).is_ok();
        self.withheld.put(tenant, *images, *per_minute, now);
        was_in && wait(&self.withheld).is_err()
    }
}

/// What an image takes, milliseconds.
fn cost(images: usize, per_minute: u32) -> u64 {
    images as u64 * MINUTE_MS / u64::from(per_minute.max(1))
}

/// When the allowance of each tenant is whole again, Unix milliseconds, of those whose is not.
#[derive(Debug, Default)]
struct Allowances(BTreeMap<String, i64>);

impl Allowances {
    fn whole(&self, tenant: &str, now: i64) -> i64 {
        let known = self.0.get(tenant).filter(|whole| !is_beyond(**whole, now));
        known.map_or(now, |whole| *whole).max(now)
    }

    /// Takes `images` from a tenant's allowance of `per_minute`, or says how many milliseconds it has to
    /// wait. A whole allowance is enough for any job: what it lacks delays the next.
    fn take(&mut self, tenant: &str, images: usize, per_minute: u32, now: i64) -> Result<(), u64> {
        let used = self.whole(tenant, now).abs_diff(now) + cost(images, per_minute).min(MINUTE_MS);
        if used > MINUTE_MS {
            return Err(used - MINUTE_MS);
        }
        self.put(tenant, images, per_minute, now);
        Ok(())
    }

    /// Takes `images` whether they are left or not.
    fn put(&mut self, tenant: &str, images: usize, per_minute: u32, now: i64) {
        self.0.retain(|_, whole| *whole > now && !is_beyond(*whole, now));
        let whole = self.whole(tenant, now).saturating_add_unsigned(cost(images, per_minute));
        self.0.insert(tenant.to_owned(), whole);
    }

    /// How many milliseconds there are until one image is left, if none is.
    fn wait(&self, tenant: &str, per_minute: u32, now: i64) -> Result<(), u64> {
        let used = self.whole(tenant, now).abs_diff(now) + cost(1, per_minute);
        if used > MINUTE_MS { Err(used - MINUTE_MS) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_worth_at_once_then_one_by_one() {
        let mut rates = Allowances::default();
        assert_eq!(rates.take("a", 50, 60, 0), Ok(()));
        assert_eq!(rates.take("a", 10, 60, 0), Ok(()));
        assert_eq!(rates.take("a", 1, 60, 0), Err(1_000));
        assert_eq!(rates.take("a", 10, 60, 4_000), Err(6_000));
        assert_eq!(rates.take("b", 60, 60, 0), Ok(()), "others have their own");
        assert_eq!(rates.take("a", 1, 60, 1_000), Ok(()));
        assert_eq!(rates.take("a", 60, 60, 61_000), Ok(()), "it fills up, and not over");
    }

    #[test]
    fn a_job_above_the_allowance_runs_and_delays_the_next() {
        let mut rates = Allowances::default();
        assert_eq!(rates.take("a", 64, 16, 0), Ok(()), "four minutes' worth");
        assert_eq!(rates.take("a", 1, 16, 0), Err(180_000 + 3_750));
        assert_eq!(rates.take("a", 1, 16, 183_750), Ok(()));
    }

    #[test]
    fn withheld_images_are_counted_after_the_fact_and_made_up_for() {
        let mut rates = Rates::default();
        let charge = |images| Charge { tenant: "a".into(), images, per_minute: 20 };
        assert!(!rates.charge(&charge(19), 0), "one is left");
        assert!(rates.charge(&charge(1), 0), "none is left");
        assert!(!rates.charge(&charge(4), 0), "it was out before");
        assert_eq!(rates.withheld.wait("a", 20, 0), Err(15_000), "five images' worth");
        assert_eq!(rates.withheld.wait("a", 20, 15_000), Ok(()));
        assert_eq!(rates.withheld.wait("b", 20, 0), Ok(()), "others have their own");
        let job = JobRecord { tenant: "a".into(), ..Default::default() };
        let quota = Quota { withheld_per_minute: Some(20), ..Quota::default() };
        assert_eq!(rates.admit(&job, quota, 0), Err(Full::Withheld { wait_ms: 15_000 }));
        assert_eq!(rates.admit(&job, Quota::default(), 0), Ok(()), "no bound");
    }
}
