//! Turns at a device: of the threads that make images with one model one computes at a time, so that the
//! device does not idle while another waits for an energy node, and is never shared.
//!
//! Who is about to ask an energy node comes first: its wait is then filled by the steps of others that ask
//! none. In the order of arrival all would wait together and compute together.

use std::{
    cell::Cell,
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tokio_util::sync::CancellationToken;

/// Whose turn it is; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Turns(Arc<Queue>);

#[derive(Debug, Default)]
struct Queue {
    line: Mutex<Line>,
    called: Condvar,
}

#[derive(Debug, Default)]
struct Line {
    is_taken: bool,
    /// The next number to draw.
    next: u64,
    waiting: BTreeSet<(Haste, u64)>,
}

/// What a thread will do with its turn. The first comes first, among equals who came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Haste {
    /// A step at whose end an energy node is asked.
    Asks,
    /// A step without.
    Alone,
}

impl Turns {
    /// Waits for a turn of this thread, to make what `cancel` cancels.
    pub fn take<'a>(&'a self, cancel: &'a CancellationToken) -> Turn<'a> {
        self.wait(Haste::Asks);
        Turn { turns: self, cancel, waited: Cell::default() }
    }

    fn wait(&self, haste: Haste) {
        let mut line = self.0.line.lock();
        let mine = (haste, line.next);
        line.next += 1;
        line.waiting.insert(mine);
        self.0
            .called
            .wait_while(&mut line, |line| line.is_taken || line.waiting.first() != Some(&mine));
        line.waiting.remove(&mine);
        line.is_taken = true;
    }

    fn pass(&self) {
        self.0.line.lock().is_taken = false;
        self.0.called.notify_all();
    }

    fn somebody_asks(&self) -> bool {
        self.0.line.lock().waiting.first().is_some_and(|(haste, _)| *haste == Haste::Asks)
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
        let _back = Back(self, Haste::Asks);
        wait()
    }

    /// To be called before a step at whose end no energy node is asked: lets those first who wait for a
    /// turn to come to their question.
    pub fn give_way(&self) {
        if self.turns.somebody_asks() {
            self.turns.pass();
            drop(Back(self, Haste::Alone));
        }
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
struct Back<'a>(&'a Turn<'a>, Haste);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        let begun = Instant::now();
        self.0.turns.wait(self.1);
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
        let line = turns.0.line.lock();
        assert!(!line.is_taken && line.waiting.is_empty(), "the next one is let in at once");
    }

    #[test]
    fn who_asks_comes_before_who_does_not() {
        let (turns, cancel) = (Turns::default(), CancellationToken::new());
        let order = Mutex::new(Vec::new());
        thread::scope(|scope| {
            let turn = turns.take(&cancel);
            turn.give_way();
            order.lock().push("alone");
            let other = scope.spawn(|| {
                let turn = turns.take(&cancel);
                order.lock().push("asks");
                turn.aside(|| ());
            });
            while !turns.somebody_asks() {
                thread::yield_now();
            }
            turn.give_way();
            order.lock().push("alone again");
            drop(turn);
            other.join().expect("no panic");
        });
        assert_eq!(*order.lock(), ["alone", "asks", "alone again"]);
    }
}
