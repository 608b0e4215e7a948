//! Pages of the guests' counter, one each second.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Error, Result};

const INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for a page.
const PATIENCE: Duration = Duration::from_secs(10);
const PAGE_BYTES_MAX: u64 = 64 << 10;

/// What a guest's page said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// In the guest's memory; grows with each request and each second.
    pub counter: u64,
    /// Another one after each boot.
    pub boot_id: String,
    /// Words of dirtied memory that were not as written.
    pub corrupt: u64,
    /// Times that a clock of the guest went backwards.
    pub clock_back: u64,
    /// The guest's own uptime.
    pub uptime_ms: u64,
}

/// What pages showed of one target.
#[derive(Debug, Clone, Default)]
pub struct PageStats {
    /// Pages that came.
    pub fetched: u64,
    /// Fetches that failed (a guest that is not there yet fails too).
    pub failed: u64,
    /// The slowest answer.
    pub slowest: Duration,
    /// Times that the counter was not greater than before.
    pub went_back: u64,
    /// Times that the boot id changed.
    pub reboots: u64,
    /// The most that any page said.
    pub corrupt: u64,
    /// The most that any page said.
    pub clock_back: u64,
    /// The last page.
    pub last: Option<Page>,
}

pub(super) type Shared = Arc<Mutex<PageStats>>;

fn lock(stats: &Shared) -> MutexGuard<'_, PageStats> {
    stats.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn snapshot(stats: &Shared) -> PageStats {
    lock(stats).clone()
}

/// Has there been a page yet?
pub(super) fn has_answered(stats: &Shared) -> bool {
    lock(stats).last.is_some()
}

pub(super) fn forget(stats: &Shared) {
    let mut stats = lock(stats);
    *stats = PageStats { last: stats.last.take(), ..PageStats::default() };
}

impl PageStats {
    fn add(&mut self, page: Page, took: Duration) {
        if let Some(last) = &self.last {
            if page.boot_id != last.boot_id {
                self.reboots += 1;
            } else if page.counter <= last.counter {
                self.went_back += 1;
            }
        }
        self.fetched += 1;
        self.slowest = self.slowest.max(took);
        self.corrupt = self.corrupt.max(page.corrupt);
        self.clock_back = self.clock_back.max(page.clock_back);
        self.last = Some(page);
    }
}

/// Fetches until told to stop. The calling thread is in the lab's namespace.
pub(super) fn fetch_all_along(address: Ipv4Addr, stats: &Shared, stop: &AtomicBool) {
    while !stop.load(Relaxed) {
        let begin = Instant::now();
        let result = fetch(address);
        let took = begin.elapsed();
        {
            let mut stats = lock(stats);
            match result {
                Ok(page) => stats.add(page, took),
                Err(_) => {
                    stats.failed += 1;
                    // Before the first page the guest is still booting.
                    if stats.last.is_some() {
                        stats.slowest = stats.slowest.max(took);
                    }
                }
            }
        }
        let next = begin + INTERVAL;
        while !stop.load(Relaxed) && Instant::now() < next {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Fetches a guest's page once. The calling thread is in the lab's namespace.
pub fn fetch(address: Ipv4Addr) -> Result<Page> {
    parse(&fetch_path(address, "/")?)
}

/// The body of any of a guest's pages.
pub fn fetch_path(address: Ipv4Addr, path: &str) -> Result<String> {
    fetch_slow(address, path, PATIENCE)
}

/// The same, of one that the guest has to work for.
pub fn fetch_slow(address: Ipv4Addr, path: &str, patience: Duration) -> Result<String> {
    let failed = |e: std::io::Error| Error::other(format!("http://{address}{path}: {e}"));
    let target = SocketAddr::from((address, 80));
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE).map_err(failed)?;
    stream.set_read_timeout(Some(patience)).map_err(failed)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes())
        .map_err(failed)?;
    let mut text = String::new();
    stream.take(PAGE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or_else(|| Error::other(format!("http://{address}{path}: no answer: {text:?}")))?;
    if !head.starts_with("HTTP/1.1 2") {
        return Err(Error::other(format!("http://{address}{path}: {head}: {}", body.trim_end())));
    }
    Ok(body.to_owned())
}

fn parse(body: &str) -> Result<Page> {
    let value = |key: &str| {
        body.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
            .ok_or_else(|| Error::other(format!("the page has no {key}: {body:?}")))
    };
    let number = |key: &str| {
        let text = value(key)?;
        text.parse::<f64>().map_err(|_| Error::other(format!("{key} {text:?} is no number")))
    };
    Ok(Page {
        counter: number("counter")? as u64,
        boot_id: value("boot_id")?.to_owned(),
        corrupt: number("corrupt")? as u64,
        clock_back: number("clock_back")? as u64,
        uptime_ms: (number("uptime")? * 1000.0) as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(counter: u64, boot_id: &str) -> Page {
        Page { counter, boot_id: boot_id.to_owned(), ..Page::default() }
    }

    #[test]
    fn a_page_is_read() {
        let body = "counter 7\nuptime 3.25\nboot_id abc\ndirty_passes 1\ncorrupt 0\nclock_back 2\n";
        let page = parse(body).unwrap();
        assert_eq!((page.counter, page.uptime_ms, page.clock_back), (7, 3250, 2));
        assert_eq!(page.boot_id, "abc");
        assert!(parse("counter 7\n").is_err());
    }

    /// A counter that stands still or falls within one boot is memory that was lost.
    #[test]
    fn counters_and_boots_are_judged() {
        let mut stats = PageStats::default();
        stats.add(page(5, "a"), Duration::ZERO);
        stats.add(page(6, "a"), Duration::ZERO);
        assert_eq!((stats.went_back, stats.reboots), (0, 0));
        stats.add(page(6, "a"), Duration::ZERO);
        assert_eq!(stats.went_back, 1);
        stats.add(page(1, "b"), Duration::ZERO);
        assert_eq!((stats.went_back, stats.reboots), (1, 1));
    }
}
