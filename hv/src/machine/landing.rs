//! A guest that has just come to this node has to catch up: its memory is mapped nowhere yet, the
//! caches hold nothing of it, and what was sent to it during the pause waits. For a moment its
//! vCPUs go before those of its neighbours.

use std::time::Duration;

use rustix::process::{Pid, getpriority_process, setpriority_process};

/// Nine times an ordinary thread's share of a processor that both want.
const NICE: i32 = -10;
/// How long; bounded, so that moving guests does not starve those that stay.
const MOMENT: Duration = Duration::from_secs(1);

/// Puts these threads first for a moment. Without the right to do so (`CAP_SYS_NICE`) nothing
/// happens.
pub(super) fn first_for_a_moment(threads: Vec<Pid>) {
    let mut before = Vec::new();
    for thread in threads {
        if let Ok(nice) = getpriority_process(Some(thread))
            && setpriority_process(Some(thread), nice + NICE).is_ok()
        {
            before.push((thread, nice));
        }
    }
    if before.is_empty() {
        return;
    }
    let give_back = move |before: &[(Pid, i32)]| {
        for (thread, nice) in before {
            // It may have ended meanwhile, with its machine.
            let _ = setpriority_process(Some(*thread), *nice);
        }
    };
    let kept = before.clone();
    let ends = std::thread::Builder::new().name("landing".into()).spawn(move || {
        std::thread::sleep(MOMENT);
        give_back(&kept);
    });
    if let Err(error) = ends {
        tracing::warn!(%error, "no thread to end the moment: it ends at once");
        give_back(&before);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;
    use std::time::Instant;

    use rustix::thread::gettid;

    use super::*;

    /// With the right or without it: afterwards all is as before.
    #[test]
    fn the_moment_ends() {
        let (tell, told) = sync_channel(1);
        let (end, ended) = sync_channel::<()>(1);
        let thread = std::thread::spawn(move || {
            tell.send(gettid()).unwrap();
            let _ = ended.recv();
        });
        let tid = told.recv().unwrap();
        let nice = || getpriority_process(Some(tid)).unwrap();
        let before = nice();
        first_for_a_moment(vec![tid]);
        assert!(nice() == before || nice() == before + NICE);
        let deadline = Instant::now() + 20 * MOMENT;
        while nice() != before {
            assert!(Instant::now() < deadline, "its neighbours starve");
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(end);
        thread.join().unwrap();
    }
}
