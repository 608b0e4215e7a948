//! What a customer would notice: pings and pages, asked all along from outside.
//!
//! One thread a domain fetches its page each second, and a thread pings each 50 ms every domain that
//! has answered with a page once (a guest that boots on an emulated core has enough to do), inside
//! the lab's namespace. Nothing here knows of migrations: gaps are what was seen.

mod page;
mod ping;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use page::{Page, PageStats, fetch, fetch_path, fetch_slow};
pub use ping::{Gap, PingStats};

use crate::netns::Netns;
use crate::process::wait_for;
use crate::{Error, Result};

/// Longest time for a page that passes.
const PAGE_MAX: Duration = Duration::from_secs(5);

/// Clients of some domains, at work until dropped.
pub struct Watch {
    targets: Vec<Target>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

struct Target {
    name: String,
    pings: ping::Shared,
    pages: page::Shared,
}

/// What the clients saw of one domain.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// By pings.
    pub pings: PingStats,
    /// By pages.
    pub pages: PageStats,
}

impl Seen {
    /// Everything that no customer should see, in words.
    pub fn faults(&self, gap_max: Duration) -> Vec<String> {
        let mut faults = Vec::new();
        let mut fault = |bad: bool, text: String| {
            if bad {
                faults.push(format!("{}: {text}", self.name));
            }
        };
        let (pings, pages) = (&self.pings, &self.pages);
        let gap = self.pings.longest_gap();
        fault(pings.answered == 0, "no ping was ever answered".to_owned());
        fault(pages.fetched == 0, "no page was ever fetched".to_owned());
        fault(gap > gap_max, format!("no ping was answered for {gap:.2?}"));
        fault(pings.duplicates > 0, format!("{} pings were answered twice", pings.duplicates));
        // The pings, 20 a second, measure the gap. A page is the guest's own work as well, on a
        // CPU that an emulated host shares out: where it has just come to, all its code is
        // translated anew.
        let slow = pages.slowest > PAGE_MAX;
        fault(slow, format!("a page took {:.2?}", pages.slowest));
        fault(pages.went_back > 0, format!("its counter went backwards {} times", pages.went_back));
        fault(pages.reboots > 0, format!("it rebooted {} times", pages.reboots));
        fault(pages.corrupt > 0, format!("{} words of its memory are wrong", pages.corrupt));
        fault(pages.clock_back > 0, format!("its clock went backwards {} times", pages.clock_back));
        faults
    }
}

impl Watch {
    /// Starts the clients; `targets` are names and addresses.
    pub fn start(netns: &Netns, targets: &[(String, Ipv4Addr)]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        let mut list = Vec::new();
        for (name, address) in targets {
            let pages = page::Shared::default();
            let (netns, pages_there, stop_there) =
                (netns.clone(), Arc::clone(&pages), Arc::clone(&stop));
            let address = *address;
            threads.push(spawn(&format!("pages {name}"), move || {
                netns.enter()?;
                page::fetch_all_along(address, &pages_there, &stop_there);
                Ok(())
            })?);
            list.push(Target { name: name.clone(), pings: ping::Shared::default(), pages });
        }
        let pings: Vec<_> = targets
            .iter()
            .zip(&list)
            .map(|((_, address), target)| ping::Target {
                address: *address,
                pings: Arc::clone(&target.pings),
                pages: Arc::clone(&target.pages),
            })
            .collect();
        let (netns, stop_there) = (netns.clone(), Arc::clone(&stop));
        threads.push(spawn("pings", move || {
            netns.enter()?;
            ping::ping_all_along(&pings, &stop_there)
        })?);
        Ok(Self { targets: list, stop, threads })
    }

    /// What was seen so far.
    pub fn seen(&self) -> Vec<Seen> {
        let now = Instant::now();
        self.targets
            .iter()
            .map(|target| Seen {
                name: target.name.clone(),
                pings: ping::snapshot(&target.pings, now),
                pages: page::snapshot(&target.pages),
            })
            .collect()
    }

    /// Waits until every domain has answered pings and pages.
    pub fn wait_all_answer(&self, patience: Duration) -> Result<()> {
        let silent = |seen: &[Seen]| {
            let silent = seen.iter().filter(|s| s.pings.answered == 0 || s.pages.fetched == 0);
            silent.map(|s| s.name.clone()).collect::<Vec<_>>().join(", ")
        };
        wait_for("an answer from every domain", patience, || {
            Ok(silent(&self.seen()).is_empty().then_some(()))
        })
        .map_err(|e| Error::other(format!("{e}: silent are {}", silent(&self.seen()))))
    }

    /// Waits until every domain is done with its boot: three pages in a row without haste. Forgets
    /// what was seen until then.
    pub fn wait_calm(&self, patience: Duration) -> Result<()> {
        const CALM: Duration = Duration::from_millis(500);
        self.forget();
        wait_for("three quick pages of every domain", patience, || {
            let seen = self.seen();
            if seen.iter().any(|s| s.pages.slowest > CALM) {
                self.forget();
                return Ok(None);
            }
            Ok(seen.iter().all(|s| s.pages.fetched >= 3).then_some(()))
        })?;
        self.forget();
        Ok(())
    }

    /// Waits until a domain has answered a ping sent from now on.
    pub fn wait_answer(&self, name: &str, patience: Duration) -> Result<()> {
        let answered = || {
            let seen = self.seen();
            seen.iter().find(|s| s.name == name).map_or(0, |s| s.pings.answered)
        };
        let before = answered();
        wait_for(&format!("an answer from {name}"), patience, || {
            Ok((answered() > before + 1).then_some(()))
        })
    }

    /// Forgets what was seen of gaps and pages so far (a phase begins).
    pub fn forget(&self) {
        for target in &self.targets {
            ping::forget(&target.pings);
            page::forget(&target.pages);
        }
    }

    /// Ends the clients; what they saw.
    pub fn stop(mut self) -> Result<Vec<Seen>> {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap_or_else(|_| Err(Error::other("a client panicked")))?;
        }
        Ok(self.seen())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

fn spawn(
    name: &str,
    work: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<JoinHandle<Result<()>>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map_err(|e| Error::other(format!("cannot start a thread: {e}")))
}
