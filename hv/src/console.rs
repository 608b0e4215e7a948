//! What the guest has said on its serial port, and who listens.
//!
//! A bounded history is kept, so that someone who attaches late still reads the boot messages,
//! or why it died. Readers hold a position in the stream of all bytes ever said; one that is too
//! slow loses the oldest bytes, never the guest's time.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::watch;

/// Bytes of history.
pub const HISTORY_BYTES: usize = 256 << 10;
/// A longer line is cut when it is looked at for a panic.
const LINE_BYTES_MAX: usize = 400;
/// How Linux' kernel says that it gives up (`kernel/panic.c`).
const PANIC_TEXT: &str = "Kernel panic - not syncing: ";
/// A kernel panics once. Texts beyond these are a user's, who would have each one reported.
const PANICS_MAX: u32 = 8;
/// How it says that it restarts in good order (`kernel/reboot.c`): whatever a panic's text was
/// doing on the console, the kernel that says this has not panicked.
const RESTART_TEXT: &str = "reboot: Restarting system";

/// The console of one domain. It outlives reboots of the guest.
pub struct Console {
    ring: Mutex<Ring>,
    /// Bytes ever said; changes wake readers.
    end: watch::Sender<u64>,
    on_panic: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("end", &*self.end.borrow()).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    end: u64,
    line: Vec<u8>,
    panic: Option<String>,
    /// How often one was read since the kernel started.
    panics: u32,
}

/// Some of what was said.
#[derive(Debug, PartialEq, Eq)]
pub struct Said {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Position behind the last of them: where to go on.
    pub next: u64,
}

impl Default for Console {
    fn default() -> Self {
        Self { ring: Mutex::default(), end: watch::Sender::new(0), on_panic: OnceLock::new() }
    }
}

impl Console {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets who is told, on the guest's thread, that a panic was read; it must not block. The
    /// first call counts.
    pub fn on_panic(&self, tell: impl Fn() + Send + Sync + 'static) {
        // A second one is a defect that does no harm.
        let _ = self.on_panic.set(Box::new(tell));
    }

    /// The guest says something.
    pub fn push(&self, bytes: &[u8]) {
        let mut ring = self.ring();
        let before = ring.panic.is_some();
        for &byte in bytes {
            if ring.bytes.len() == HISTORY_BYTES {
                ring.bytes.pop_front();
            }
            ring.bytes.push_back(byte);
            match byte {
                b'\n' => ring.end_line(),
                _ if ring.line.len() < LINE_BYTES_MAX => ring.line.push(byte),
                _ => {}
            }
        }
        ring.end += bytes.len() as u64;
        let (end, panicked) = (ring.end, !before && ring.panic.is_some());
        drop(ring);
        self.end.send_replace(end);
        if let (true, Some(tell)) = (panicked, self.on_panic.get()) {
            tell();
        }
    }

    /// What the guest said elsewhere takes the place of everything said here.
    pub fn replace(&self, history: &[u8]) {
        let mut ring = self.ring();
        ring.bytes.clear();
        ring.line.clear();
        drop(ring);
        self.push(history);
    }

    /// At most `bytes_max` bytes from `position` on; from the oldest that are kept, when those
    /// are gone. Empty when nothing is new.
    pub fn read(&self, position: u64, bytes_max: usize) -> Said {
        let ring = self.ring();
        let oldest = ring.end - ring.bytes.len() as u64;
        let start = position.clamp(oldest, ring.end);
        let bytes: Vec<u8> =
            ring.bytes.iter().skip((start - oldest) as usize).take(bytes_max).copied().collect();
        Said { next: start + bytes.len() as u64, bytes }
    }

    /// The last bytes said, at most so many.
    pub fn tail(&self, bytes_max: usize) -> Vec<u8> {
        let ring = self.ring();
        ring.bytes.iter().skip(ring.bytes.len().saturating_sub(bytes_max)).copied().collect()
    }

    /// A receiver that sees each change of the number of bytes ever said.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.end.subscribe()
    }

    /// What a kernel that panicked has said last, since [`forget_panic`](Self::forget_panic).
    /// A guest's users can make it say this; alone it is a hint, no proof.
    pub fn panic(&self) -> Option<String> {
        self.ring().panic.clone()
    }

    /// A new kernel starts.
    pub fn forget_panic(&self) {
        let mut ring = self.ring();
        ring.panic = None;
        ring.panics = 0;
        ring.line.clear();
    }
}

impl Ring {
    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        // "---[ end Kernel panic …" says it again.
        if let Some(at) = line.find(PANIC_TEXT)
            && !line[..at].contains("[ end ")
        {
            if self.panics < PANICS_MAX {
                let text: String = line[at..].chars().filter(|c| !c.is_control()).collect();
                self.panic = Some(text.trim_end().to_owned());
                self.panics += 1;
            }
        } else if line.contains(RESTART_TEXT) {
            self.panic = None;
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_readers_get_the_history_and_then_what_comes() {
        let console = Console::default();
        console.push(b"hello ");
        console.push(b"world");
        let said = console.read(0, 100);
        assert_eq!(said, Said { bytes: b"hello world".to_vec(), next: 11 });
        assert_eq!(console.read(said.next, 100).bytes, b"");
        console.push(b"!");
        assert_eq!(console.read(said.next, 100), Said { bytes: b"!".to_vec(), next: 12 });
        assert_eq!(console.read(0, 5).bytes, b"hello");
    }

    /// However much is said, the history stays bounded, and a slow reader goes on with the oldest.
    #[test]
    fn history_is_bounded() {
        let console = Console::default();
        let line = [b'x'; 1000];
        for _ in 0..300 {
            console.push(&line);
        }
        console.push(b"end");
        let said = console.read(10, usize::MAX);
        assert_eq!((said.bytes.len(), said.next), (HISTORY_BYTES, 300_003));
        assert!(said.bytes.ends_with(b"xend"));
        assert!(console.ring().bytes.capacity() <= 2 * HISTORY_BYTES);
    }

    #[test]
    fn readers_are_woken() {
        let console = Console::default();
        let mut receiver = console.watch();
        console.push(b"x");
        assert!(receiver.has_changed().unwrap());
        assert_eq!(*receiver.borrow_and_update(), 1);
    }

    /// The panic's own line is kept, however the bytes came in, and not its echo at the end.
    #[test]
    fn panics_are_recognised() {
        let console = Console::default();
        console.push(b"[    1.0] Kernel panic - not sync");
        assert_eq!(console.panic(), None);
        console.push(b"ing: Attempted to kill init! exitcode=0x00000100\r\n[    1.1] CPU: 0\r\n");
        console.push(b"[    1.2] ---[ end Kernel panic - not syncing: Attempted to kill ---\r\n");
        let text = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100";
        assert_eq!(console.panic().as_deref(), Some(text));
        console.forget_panic();
        assert_eq!(console.panic(), None);
    }

    /// Each panic is news for the controller: a user who writes them to the console is not heard
    /// for ever.
    #[test]
    fn panics_are_believed_a_few_times() {
        let console = Console::default();
        let mut news = 0;
        for n in 0..1000 {
            console.push(
                format!("reboot: Restarting system\nKernel panic - not syncing: {n}\n").as_bytes(),
            );
            news += u32::from(console.panic().is_some());
        }
        assert_eq!(news, PANICS_MAX);
        console.forget_panic();
        console.push(b"Kernel panic - not syncing: hung\n");
        assert!(console.panic().is_some());
    }

    /// Somebody reads a log on the console and reboots: that is no crash.
    #[test]
    fn a_restart_in_good_order_is_no_panic() {
        let console = Console::default();
        let told = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
        let tell = std::sync::Arc::clone(&told);
        console.on_panic(move || {
            tell.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        });
        console.push(b"# cat old.log\r\nKernel panic - not syncing: hung\r\n# reboot\r\n");
        assert!(console.panic().is_some());
        console.push(b"[   99.0] reboot: Restarting system\r\n");
        assert_eq!(console.panic(), None);
        assert_eq!(told.load(std::sync::atomic::Ordering::SeqCst), 1);
    }
}
