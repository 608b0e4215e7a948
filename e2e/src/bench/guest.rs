//! The guest's page, and what must hold of a guest before its figures count.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::stage::{Stage, Who};
use crate::client::fetch_path;
use crate::process::wait_for;
use crate::{Error, Result};

const ALIVE_PATIENCE: Duration = Duration::from_secs(120);
/// A guest is at work when it has dirtied its memory so many times since it was looked at.
const PASSES_AT_WORK: u64 = 10;
/// And, where it writes to a disk, when it has written and flushed so many blocks: of more than one
/// flush.
const DISK_WRITES_AT_WORK: u64 = 16;

/// What the page says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Page {
    counter: u64,
    boot_id: String,
    dirty_passes: u64,
    corrupt: u64,
    clock_back: u64,
    disk_writes: u64,
    disk_wrong: u64,
}

impl Page {
    fn parse(text: &str) -> Option<Self> {
        let value = |key: &str| {
            text.lines().find_map(|l| l.split_once(' ').filter(|(k, _)| *k == key)).map(|(_, v)| v)
        };
        let number = |key: &str| value(key)?.trim().parse().ok();
        Some(Self {
            counter: number("counter")?,
            boot_id: value("boot_id")?.trim().to_owned(),
            dirty_passes: number("dirty_passes")?,
            corrupt: number("corrupt")?,
            clock_back: number("clock_back")?,
            disk_writes: number("disk_writes")?,
            disk_wrong: number("disk_wrong")?,
        })
    }

    /// Checks that `now` is the same guest, alive and unharmed.
    pub(super) fn check_goes_on(&self, now: &Self) -> Result<()> {
        let wrong = |what: &str| Err(Error::other(format!("{what}: before {self:?}, now {now:?}")));
        if now.boot_id != self.boot_id {
            return wrong("the guest has booted again");
        }
        if now.counter <= self.counter {
            return wrong("the guest's counter stands still or went back");
        }
        if now.corrupt != 0 {
            return wrong("the guest's memory is corrupt");
        }
        if now.disk_wrong != 0 {
            return wrong("the guest's disk has failed or lost a write");
        }
        if now.clock_back != self.clock_back {
            return wrong("the guest's clock went back");
        }
        Ok(())
    }
}

/// Waits until the guest answers.
pub(super) fn page(address: Ipv4Addr) -> Result<Page> {
    wait_for(&format!("an answer from the guest at {address}"), ALIVE_PATIENCE, || {
        Ok(fetch_path(address, "/").ok().and_then(|text| Page::parse(&text)))
    })
}

/// Waits until the guest dirties its memory, from now on, and writes to the disk that it has.
pub(super) fn wait_at_work(stage: &Stage, who: Who) -> Result<Page> {
    let address = who.address();
    let first = page(address)?;
    let writes = if stage.guest.disk(who, 0).is_some() { DISK_WRITES_AT_WORK } else { 0 };
    wait_for(&format!("the guest at {address} to be at work"), ALIVE_PATIENCE, || {
        let now = page(address)?;
        first.check_goes_on(&now)?;
        let is_at_work = now.dirty_passes >= first.dirty_passes + PASSES_AT_WORK
            && now.disk_writes >= first.disk_writes + writes;
        Ok(is_at_work.then_some(now))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "counter 7\nuptime 1.5\nboot_id abc\n\
                        dirty_passes 3\ncorrupt 0\nclock_back 0\nrealtime_ns 1\n\
                        disk_writes 5\ndisk_wrong 0\n";

    /// A guest that was restarted, stands still or was damaged is never measured.
    #[test]
    fn a_guest_that_came_to_harm_is_noticed() {
        let before = Page::parse(TEXT).unwrap();
        let after = Page { counter: 8, ..before.clone() };
        before.check_goes_on(&after).unwrap();
        for bad in [
            Page { counter: 7, ..after.clone() },
            Page { boot_id: "abd".into(), ..after.clone() },
            Page { corrupt: 1, ..after.clone() },
            Page { disk_wrong: 1, ..after.clone() },
            Page { clock_back: 1, ..after },
        ] {
            before.check_goes_on(&bad).unwrap_err();
        }
    }
}
