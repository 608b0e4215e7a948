//! What tells the guest to end: the ACPI power button, and words typed at the console.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::load::Shared;
use crate::sys::{self, End};

const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// `struct input_event` on 64 bits: two words of time, type, code, value.
const INPUT_EVENT_BYTES: usize = 24;

/// Reads every input device, those that come later too; the power key powers off.
pub(crate) fn watch_power_button() {
    std::thread::spawn(|| {
        let mut known: HashSet<PathBuf> = HashSet::new();
        loop {
            let devices = std::fs::read_dir("/dev/input").into_iter().flatten().flatten();
            for path in devices.map(|d| d.path()) {
                let is_event =
                    path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("event"));
                if is_event && known.insert(path.clone()) {
                    std::thread::spawn(move || read_keys(path));
                }
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    });
}

fn read_keys(path: PathBuf) {
    let Ok(mut device) = File::open(&path) else { return };
    let mut event = [0; INPUT_EVENT_BYTES];
    while device.read_exact(&mut event).is_ok() {
        let kind = u16::from_ne_bytes([event[16], event[17]]);
        let code = u16::from_ne_bytes([event[18], event[19]]);
        let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
        if (kind, code, value) == (EV_KEY, KEY_POWER, 1) {
            println!("drover-guest: power button");
            End::PowerOff.run();
        }
    }
}

/// Obeys lines typed at the console.
pub(crate) fn watch_console(shared: Arc<Shared>) {
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let line = line.trim();
            if let Some(end) = End::from_word(line) {
                println!("drover-guest: {line}");
                end.run();
                continue;
            }
            match line.split_once(' ').unwrap_or((line, "")) {
                ("", _) => {}
                ("uptime", _) => println!("uptime {}", sys::uptime_seconds()),
                ("counter", _) => println!("counter {}", shared.count(1)),
                ("corrupt", _) => println!("corrupt {}", shared.corrupt().load(Relaxed)),
                ("echo", text) => println!("{text}"),
                (other, _) => println!(
                    "{other:?}: there are echo, uptime, counter, corrupt, poweroff, reboot, panic"
                ),
            }
        }
    });
}
