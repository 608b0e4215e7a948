//! The guests come first: in the first pass, by far the longest, the threads that send and receive
//! a guest's memory take what the two nodes' processors leave over.

use rustix::process::{getpriority_process, setpriority_process};
use rustix::thread::gettid;

/// A tenth of an ordinary thread's share of a processor that both want.
const NICE: i32 = 10;

/// The calling thread stands back until this is ended or dropped.
#[derive(Debug)]
pub(super) struct Courtesy {
    /// As it was before; `None` when there is nothing to undo.
    before: Option<i32>,
}

impl Courtesy {
    /// Stands back. Only where the thread may step forward again: without that right
    /// (`CAP_SYS_NICE`, `RLIMIT_NICE`) the pause itself would be slow.
    pub(super) fn begin() -> Self {
        let thread = Some(gettid());
        let Ok(before) = getpriority_process(thread) else { return Self { before: None } };
        let may_return = setpriority_process(thread, before + 1)
            .and_then(|()| setpriority_process(thread, before))
            .is_ok();
        let stands_back = may_return && setpriority_process(thread, before + NICE).is_ok();
        Self { before: stands_back.then_some(before) }
    }

    /// For a thread that this one starts, and which stands back as this one does.
    pub(super) fn inherited(&self) -> Inherited {
        Inherited(self.before)
    }

    /// Steps forward again.
    pub(super) fn end(&mut self) {
        if let Some(before) = self.before.take()
            && let Err(error) = setpriority_process(Some(gettid()), before)
        {
            tracing::warn!(%error, "the migration's thread keeps its low priority");
        }
    }
}

/// The courtesy of a thread that has just begun.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inherited(Option<i32>);

impl Inherited {
    /// Called by that thread.
    pub(super) fn begin(self) -> Courtesy {
        Courtesy { before: self.0 }
    }
}

impl Drop for Courtesy {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the rights of the one who runs this: afterwards all is as before.
    #[test]
    fn priority_is_given_back() {
        std::thread::spawn(|| {
            let nice = || getpriority_process(Some(gettid())).unwrap();
            let before = nice();
            let mut courtesy = Courtesy::begin();
            // 19 is the lowest priority there is.
            assert!(nice() == before || nice() == (before + NICE).min(19));
            courtesy.end();
            assert!(nice() <= before + 1);
        })
        .join()
        .unwrap();
    }
}
