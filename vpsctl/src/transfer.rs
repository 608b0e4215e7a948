//! How the bytes of one transfer go, on stderr: a bar on a terminal, a line each few seconds
//! elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;

use crate::{
    out::human::size,
    progress::{TICK, style},
};

/// Between two lines where there is no terminal: a log is to be read.
const LINE_PAUSE: Duration = Duration::from_secs(5);

/// Shows one transfer until it is dropped.
pub(crate) struct Transfer {
    title: String,
    /// What is being done once all is read.
    at_end: &'static str,
    began: Instant,
    display: Display,
}

enum Display {
    Bar(ProgressBar),
    /// When the last line was printed.
    Lines(Option<Instant>),
}

impl Transfer {
    /// A bar when stderr is a terminal.
    pub(crate) fn new(title: String, at_end: &'static str) -> Self {
        let began = Instant::now();
        if !std::io::stderr().is_terminal() {
            return Self { title, at_end, began, display: Display::Lines(None) };
        }
        let bar = ProgressBar::new(100);
        bar.set_style(style("{spinner} {prefix} [{bar:20}] {pos:>3}% {elapsed} {wide_msg}"));
        bar.set_prefix(title.clone());
        bar.enable_steady_tick(TICK);
        Self { title, at_end, began, display: Display::Bar(bar) }
    }

    /// Shows how far it is, in bytes; a total of 0 is not known.
    pub(crate) fn update(&mut self, done: u64, total: u64) {
        let now = Instant::now();
        if let Some(line) = self.show(done, total, now) {
            eprintln!("{line}");
        }
    }

    /// The line that is due now; none on a terminal.
    fn show(&mut self, done: u64, total: u64, now: Instant) -> Option<String> {
        let text = text(done, total, now.duration_since(self.began), self.at_end);
        match &mut self.display {
            Display::Bar(bar) => {
                bar.set_position(percent(done, total).unwrap_or_default());
                bar.set_message(text);
                None
            }
            Display::Lines(Some(last)) if now.duration_since(*last) < LINE_PAUSE => None,
            Display::Lines(last) => {
                *last = Some(now);
                let percent = percent(done, total).map(|p| format!(" ({p}%)")).unwrap_or_default();
                Some(format!("{}: {text}{percent}", self.title))
            }
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
    }
}

fn percent(done: u64, total: u64) -> Option<u64> {
    let percent = u128::from(done) * 100 / u128::from((total > 0).then_some(total)?);
    // More than was announced is still not more than all.
    Some(u64::try_from(percent).unwrap_or(100).min(100))
}

/// `512 MiB of 3 GiB, 100 MiB/s`; what remains to be done once all is read.
fn text(done: u64, total: u64, elapsed: Duration, at_end: &str) -> String {
    let of = if total > 0 { format!(" of {}", size(total)) } else { String::new() };
    if total > 0 && done >= total {
        return format!("{}{of} {at_end}", size(done));
    }
    let seconds = elapsed.as_secs_f64();
    // In the first moment a rate means nothing.
    let rate = if seconds < 1.0 {
        String::new()
    } else {
        format!(", {}/s", size((done as f64 / seconds) as u64))
    };
    format!("{}{of}{rate}", size(done))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A log gets the beginning, then a line each few seconds however often there is news.
    #[test]
    fn lines_are_seconds_apart() {
        let began = Instant::now();
        let display = Display::Lines(None);
        let mut transfer = Transfer {
            title: "import image a".to_owned(),
            at_end: "read, being made an image",
            began,
            display,
        };
        let mut show =
            |done, ms| transfer.show(done, 1000 * MIB, began + Duration::from_millis(ms));
        assert_eq!(show(0, 10).unwrap(), "import image a: 0 B of 1000 MiB (0%)");
        assert_eq!(show(100 * MIB, 1000), None);
        assert_eq!(show(400 * MIB, 5009), None);
        let line = "import image a: 501 MiB of 1000 MiB, 100 MiB/s (50%)";
        assert_eq!(show(501 * MIB, 5010).unwrap(), line);
        assert_eq!(show(600 * MIB, 10_000), None);
        let line = "import image a: 1000 MiB of 1000 MiB read, being made an image (100%)";
        assert_eq!(show(1000 * MIB, 11_000).unwrap(), line);
    }

    /// What a node fetches may have no length, or more than was said.
    #[test]
    fn odd_totals_are_shown_as_they_are() {
        assert_eq!(text(3 * MIB, 0, Duration::from_secs(2), "read"), "3 MiB, 1.5 MiB/s");
        assert_eq!(percent(3 * MIB, 0), None);
        assert_eq!(percent(3 * MIB, MIB), Some(100));
        assert_eq!(percent(u64::MAX, 1), Some(100));
    }
}
