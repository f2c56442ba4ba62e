//! Turns at a device: of the threads that make images with one model one computes at a time, so that the
//! device does not idle while another waits for an energy node, and is never shared.

use std::{
    cell::Cell,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tokio_util::sync::CancellationToken;

/// Whose turn it is, first come, first served; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Turns(Arc<Queue>);

#[derive(Debug, Default)]
struct Queue {
    numbers: Mutex<Numbers>,
    called: Condvar,
}

#[derive(Debug, Default)]
struct Numbers {
    /// The next number to draw.
    next: u64,
    /// The number whose turn it is.
    current: u64,
}

impl Turns {
    /// Waits for a turn of this thread, to make what `cancel` cancels.
    pub fn take<'a>(&'a self, cancel: &'a CancellationToken) -> Turn<'a> {
        self.wait();
        Turn { turns: self, cancel, waited: Cell::default() }
    }

    fn wait(&self) {
        let mut numbers = self.0.numbers.lock();
        let mine = numbers.next;
        numbers.next += 1;
        self.0.called.wait_while(&mut numbers, |numbers| numbers.current != mine);
    }

    fn pass(&self) {
        self.0.numbers.lock().current += 1;
        self.0.called.notify_all();
    }
}

/// This thread's turn; it ends when it is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    turns: &'a Turns,
    cancel: &'a CancellationToken,
    waited: Cell<Duration>,
}

impl Turn<'_> {
    /// What cancels the work.
    pub fn cancel(&self) -> &CancellationToken {
        self.cancel
    }

    /// Lets others compute while `wait` waits for something, then waits for the next turn.
    pub fn aside<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.turns.pass();
        let _back = Back(self);
        wait()
    }

    /// Time spent waiting for further turns, when others computed.
    pub fn waited(&self) -> Duration {
        self.waited.get()
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.pass();
    }
}

/// Takes the turn back, after a panic too: dropping it passes it on.
struct Back<'a>(&'a Turn<'a>);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        let begun = Instant::now();
        self.0.turns.wait();
        self.0.waited.set(self.0.waited.get() + begun.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        sync::{
            Barrier,
            atomic::{AtomicU32, Ordering},
        },
        thread,
    };

    use super::*;

    #[test]
    fn one_computes_while_others_wait() {
        let (turns, cancel) = (Turns::default(), CancellationToken::new());
        let (computing, done) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let turn = turns.take(&cancel);
                    for _ in 0..100 {
                        assert_eq!(computing.fetch_add(1, Ordering::SeqCst), 0, "alone");
                        thread::yield_now();
                        computing.fetch_sub(1, Ordering::SeqCst);
                        turn.aside(thread::yield_now);
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(done.into_inner(), 400);
    }

    #[test]
    fn a_wait_gives_the_turn_to_another() {
        let (turns, cancel) = (Turns::default(), CancellationToken::new());
        // Passed by both only if both wait at the same time, each in its own turn.
        let both = Barrier::new(2);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| turns.take(&cancel).aside(|| both.wait()));
            }
        });
        assert_eq!(turns.take(&cancel).waited(), Duration::ZERO);
    }

    #[test]
    fn a_panic_passes_the_turn_on_once() {
        let (turns, cancel) = (Turns::default(), CancellationToken::new());
        for _ in 0..2 {
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                turns.take(&cancel).aside(|| panic!("no answer"));
            }));
            assert!(panicked.is_err());
        }
        let numbers = turns.0.numbers.lock();
        assert_eq!(numbers.next, numbers.current, "the next one is let in at once");
    }
}
