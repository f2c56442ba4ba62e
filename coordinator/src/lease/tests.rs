use proptest::prelude::*;

use super::*;

const TTL: i64 = 100;

fn retry(reason: &str) -> Failure {
    Failure { reason: reason.to_owned(), retryable: true, delay_ms: 10 }
}

fn obstacle(max_wait_ms: i64) -> Obstacle {
    Obstacle { reason: "no node".to_owned(), delay_ms: 10, max_wait_ms }
}

/// Numbers say which delivery acts: 0 the newest, 1 the one before.
#[derive(Debug, Clone)]
enum Op {
    Grant,
    Renew(usize),
    Commit(usize),
    Fail(usize, bool),
    Expire(usize),
    Recover(usize),
    Postpone,
    GiveBack(usize),
    Cancel,
    Wait(i64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => Just(Op::Grant),
        2 => (0usize..3).prop_map(Op::Renew),
        3 => (0usize..3).prop_map(Op::Commit),
        1 => (0usize..3, any::<bool>()).prop_map(|(back, retry)| Op::Fail(back, retry)),
        2 => (0usize..3).prop_map(Op::Expire),
        1 => (0usize..3).prop_map(Op::Recover),
        1 => Just(Op::Postpone),
        1 => (0usize..3).prop_map(Op::GiveBack),
        1 => Just(Op::Cancel),
        3 => (0i64..250).prop_map(Op::Wait),
    ]
}

proptest! {
    /// Whatever the order of grants, renewals, expiries and commits: one result at most, only
    /// from the newest token, tokens only grow, deliveries are bounded, an end is an end.
    #[test]
    fn at_most_one_result_under_any_interleaving(ops in prop::collection::vec(op(), 0..60)) {
        let mut lease = Lease::default();
        let (mut now, mut tokens, mut accepted) = (0i64, vec![0u64], None);
        for op in ops {
            let before = lease.clone();
            let newest = *tokens.last().expect("never empty");
            let token_of = |back: usize| tokens[(tokens.len() - 1).saturating_sub(back)];
            match op {
                Op::Grant => {
                    if let Ok(token) = lease.grant("w", now, TTL) {
                        prop_assert!(token > newest);
                        tokens.push(token);
                    }
                }
                Op::Renew(back) => {
                    let token = token_of(back);
                    prop_assert!(lease.renew(token, now, TTL).is_err() || token == newest);
                }
                Op::Commit(back) => {
                    let token = token_of(back);
                    match lease.commit(token) {
                        Ok(Commit::First) => {
                            prop_assert_eq!(token, newest);
                            prop_assert_eq!(accepted.replace(token), None);
                        }
                        Ok(Commit::Again) => prop_assert_eq!(accepted, Some(token)),
                        Err(_) => prop_assert_eq!(&before, &lease),
                    }
                }
                Op::Fail(back, retryable) => {
                    let token = token_of(back);
                    let failure = Failure { retryable, ..retry("failed") };
                    prop_assert!(lease.fail(token, &failure, now).is_err() || token == newest);
                }
                Op::Expire(back) => {
                    let token = token_of(back);
                    let due = before.expires_unix_ms() <= now;
                    prop_assert!(lease.expire(token, now).is_err() || due);
                }
                Op::Recover(back) => {
                    let due = before.expires_unix_ms() <= now;
                    prop_assert!(lease.recover(token_of(back), now).is_err() || due);
                }
                Op::Postpone => { let _ = lease.postpone(&obstacle(300), now); }
                Op::GiveBack(back) => { let _ = lease.give_back(token_of(back)); }
                Op::Cancel => { lease.cancel(); }
                Op::Wait(ms) => now += ms,
            }
            prop_assert!(lease.token() >= before.token());
            prop_assert!(lease.deliveries() <= MAX_DELIVERIES);
            if before.is_terminal() {
                prop_assert_eq!(&before, &lease);
            }
        }
    }
}

#[test]
fn a_poison_shard_stops_with_its_last_reason() {
    let mut lease = Lease::default();
    for delivery in 1..=MAX_DELIVERIES {
        let now = i64::from(delivery) * 1000;
        let token = lease.grant("w", now, TTL).expect("it waits");
        let after = lease.fail(token, &retry(&format!("crash {delivery}")), now);
        let given_up = delivery == MAX_DELIVERIES;
        let expected = if given_up { AfterFailure::GivenUp } else { AfterFailure::Requeued };
        assert_eq!(after, Ok(expected));
    }
    assert_eq!((lease.phase(), lease.reason()), (Phase::Failed, "crash 5"));
}

#[test]
fn a_failed_delivery_waits_out_its_delay() {
    let mut lease = Lease::default();
    let token = lease.grant("w", 0, TTL).expect("it waits");
    lease.fail(token, &retry("node gone"), 50).expect("the token is current");
    assert_eq!(lease.grant("w", 59, TTL), Err(LeaseError::TooEarly(60)));
    assert_eq!(lease.grant("w", 60, TTL), Ok(60));
}

#[test]
fn a_shard_that_is_put_off_for_too_long_has_failed() {
    let mut lease = Lease::default();
    for now in [5, 50] {
        assert_eq!(lease.postpone(&obstacle(100), now), Ok(AfterFailure::Requeued));
    }
    let token = lease.grant("w", 70, TTL).expect("it waits no longer");
    lease.fail(token, &retry("node gone"), 80).expect("the token is current");
    for now in [90, 189] {
        let after = lease.postpone(&obstacle(100), now);
        assert_eq!(after, Ok(AfterFailure::Requeued), "a delivery in between begins anew");
    }
    assert_eq!(lease.postpone(&obstacle(100), 190), Ok(AfterFailure::GivenUp));
    assert_eq!((lease.phase(), lease.reason()), (Phase::Failed, "no node"));
}

#[test]
fn a_clock_that_was_wrong_for_a_minute_neither_fails_a_shard_nor_keeps_it() {
    const YEAR: i64 = 365 * 24 * 3_600_000;
    let mut lease = Lease::default();
    let token = lease.grant("w", YEAR, TTL).expect("it waits");
    lease.renew(token, 5, TTL).expect("the clock is right again");
    assert_eq!(lease.expires_unix_ms(), 5 + TTL);
    lease.fail(token, &retry("broken"), 6).expect("the token is current");
    let token = lease.grant("w", YEAR, TTL).expect("it waits");
    assert_eq!(lease.expire(token, 50), Ok(AfterFailure::Requeued), "nobody means a year");
    // Put off by a clock that is ahead, then by the right one.
    assert_eq!(lease.postpone(&obstacle(100_000), YEAR), Ok(AfterFailure::Requeued));
    assert_eq!(lease.postpone(&obstacle(100_000), 60), Ok(AfterFailure::Requeued));
    assert_eq!(lease.postpone(&obstacle(100_000), 70), Ok(AfterFailure::Requeued));
    // And the other way round.
    assert_eq!(lease.postpone(&obstacle(100_000), YEAR), Ok(AfterFailure::Requeued));
    let token = lease.grant("w", 80, TTL).expect("it waits no longer than was meant");
    assert!(lease.commit(token).is_ok());
}

#[test]
fn a_store_that_lost_a_grant_does_not_give_its_token_again() {
    let mut lease = Lease::default();
    let lost = lease.clone().grant("w", 1_000, TTL).expect("it waits");
    assert!(lease.grant("w", 1_001, TTL).expect("it waits") > lost);
}

#[test]
fn a_restart_of_the_coordinator_costs_no_delivery() {
    let mut lease = Lease::default();
    for expected in 1..20 {
        assert_eq!(lease.grant("w", 0, TTL), Ok(expected));
        lease.give_back(expected).expect("the token is current");
    }
    assert_eq!(lease.deliveries(), 0);
}

#[test]
fn a_coordinator_that_dies_a_hundred_times_costs_no_delivery() {
    let mut lease = Lease::default();
    for _ in 0..100 {
        let now = lease.expires_unix_ms() + 1_000;
        let token = lease.grant("w", now, TTL).expect("it waits");
        let early = lease.recover(token, now + TTL - 1);
        assert_eq!(early, Err(LeaseError::NotExpired(now + TTL)), "its coordinator may be there");
        lease.recover(token, now + TTL).expect("nobody renewed it");
    }
    assert_eq!((lease.phase(), lease.deliveries()), (Phase::Queued, 0));
}

#[test]
fn only_an_expired_lease_expires_and_renewal_moves_the_end() {
    let mut lease = Lease::default();
    let token = lease.grant("w-1", 0, TTL).expect("it waits");
    lease.renew(token, 60, TTL).expect("the token is current");
    assert_eq!(lease.expire(token, 100), Err(LeaseError::NotExpired(160)));
    assert_eq!(lease.expire(token, 160), Ok(AfterFailure::Requeued));
    assert!(lease.reason().contains("w-1"));
    assert!(matches!(lease.commit(token), Err(LeaseError::Stale { current: 1, .. })));
}
