//! How many images a tenant may ask for in a minute: the generic cell rate algorithm (ITU-T I.371). What
//! is left of the allowance follows from one number, the time at which it is whole again.

use std::collections::BTreeMap;

use super::Full;
use crate::{clock::is_beyond, state::JobRecord, tenants::Quota};

/// The time that an allowance is for, milliseconds.
const MINUTE_MS: u64 = 60_000;

/// When the allowance of each tenant is whole again, Unix milliseconds, of those whose is not.
#[derive(Debug, Default)]
pub(super) struct Rates(BTreeMap<String, i64>);

impl Rates {
    /// Takes the images of a job from its tenant's allowance, if that has a bound.
    pub(super) fn admit(&mut self, job: &JobRecord, quota: Quota, now: i64) -> Result<(), Full> {
        let Some(per_minute) = quota.images_per_minute else { return Ok(()) };
        self.take(&job.tenant, job.job.images.len(), per_minute, now)
            .map_err(|wait_ms| Full::Rate { wait_ms })
    }

    /// Takes `images` from a tenant's allowance of `per_minute`, or says how many milliseconds it has to
    /// wait. A whole allowance is enough for any job: what it lacks delays the next.
    fn take(&mut self, tenant: &str, images: usize, per_minute: u32, now: i64) -> Result<(), u64> {
        self.0.retain(|_, whole| *whole > now && !is_beyond(*whole, now));
        let whole = self.0.get(tenant).map_or(now, |whole| *whole);
        let cost = images as u64 * MINUTE_MS / u64::from(per_minute.max(1));
        let used = whole.abs_diff(now) + cost.min(MINUTE_MS);
        if used > MINUTE_MS {
            return Err(used - MINUTE_MS);
        }
        self.0.insert(tenant.to_owned(), whole.saturating_add_unsigned(cost));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_worth_at_once_then_one_by_one() {
        let mut rates = Rates::default();
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
        let mut rates = Rates::default();
        assert_eq!(rates.take("a", 64, 16, 0), Ok(()), "four minutes' worth");
        assert_eq!(rates.take("a", 1, 16, 0), Err(180_000 + 3_750));
        assert_eq!(rates.take("a", 1, 16, 183_750), Ok(()));
    }
}
