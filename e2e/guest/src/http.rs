//! A page with the counter, and the buttons: `/`, `/check`, `/poweroff`, `/reboot`, `/panic`;
//! and `/fio?--name=a&--rw=read…`, which runs fio with these arguments and answers what it says.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::load::{Fill, Shared};
use crate::sys::{self, End};

/// Each answers one connection at a time.
const WORKERS: usize = 4;
const REQUEST_BYTES_MAX: usize = 2048;
/// There when the initramfs has it.
const FIO: &str = "/usr/bin/fio";
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves on port 80. The threads are there beforehand: one that had to be made while the guest's
/// writes are logged would pay for each page of its stack.
pub(crate) fn serve(shared: &Arc<Shared>, fill: &Arc<Fill>) -> Result<(), String> {
    let listener =
        TcpListener::bind(("0.0.0.0", 80)).map_err(|e| format!("cannot listen on port 80: {e}"))?;
    let listener = Arc::new(listener);
    for _ in 0..WORKERS {
        let (listener, shared, fill) =
            (Arc::clone(&listener), Arc::clone(shared), Arc::clone(fill));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away is its own affair.
                let _ = answer(stream, &shared, &fill);
            }
        });
    }
    Ok(())
}

fn answer(mut stream: TcpStream, shared: &Shared, fill: &Fill) -> std::io::Result<()> {
    // An answer always fits the socket's buffer: only reading can take for ever.
    stream.set_read_timeout(Some(PATIENCE))?;
    let Some(path) = read_path(&mut stream)? else {
        return respond(&mut stream, "400 Bad Request", "expected GET /path\n");
    };
    let word = path.trim_start_matches('/');
    if let Some(arguments) = word.strip_prefix("fio?") {
        return match sys::run_program(FIO, arguments.split('&')) {
            Ok(output) => respond(&mut stream, "200 OK", &output),
            Err(error) => respond(&mut stream, "500 Internal Server Error", &error),
        };
    }
    match (word, End::from_word(word)) {
        ("", _) => respond(&mut stream, "200 OK", &page(shared)),
        ("check", _) => {
            let body = format!("filled_mib {}\nwrong_words {}\n", fill.mib(), fill.wrong_words());
            respond(&mut stream, "200 OK", &body)
        }
        (_, Some(end)) => {
            respond(&mut stream, "202 Accepted", &format!("{word}\n"))?;
            drop(stream);
            // The answer should leave before the guest does.
            std::thread::sleep(Duration::from_millis(200));
            end.run();
            Ok(())
        }
        _ => respond(
            &mut stream,
            "404 Not Found",
            "there are /, /check, /fio, /poweroff, /reboot and /panic\n",
        ),
    }
}

fn page(shared: &Shared) -> String {
    let memory = format!(
        "counter {}\nuptime {}\nboot_id {}\ndirty_passes {}\ncorrupt {}\nclock_back {}\nrealtime_ns {}\n",
        shared.count(1),
        sys::uptime_seconds(),
        sys::boot_id(),
        shared.passes().load(Relaxed),
        shared.corrupt().load(Relaxed),
        shared.clock_back().load(Relaxed),
        sys::clock_ns(libc::CLOCK_REALTIME),
    );
    let (writes, wrong) = (shared.disk_writes().load(Relaxed), shared.disk_wrong().load(Relaxed));
    format!(
        "{memory}disk_writes {writes}\ndisk_wrong {wrong}\ndisk_failed {}\ndisk_flushed {}\n\
         disk_kept {}\n",
        shared.disk_failed().load(Relaxed),
        shared.disk_flushed().load(Relaxed),
        shared.disk_kept().load(Relaxed),
    )
}

fn read_path(stream: &mut TcpStream) -> std::io::Result<Option<String>> {
    let mut request = Vec::new();
    let mut chunk = [0; 512];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < REQUEST_BYTES_MAX {
        match stream.read(&mut chunk)? {
            0 => break,
            n => request.extend_from_slice(&chunk[..n]),
        }
    }
    let text = String::from_utf8_lossy(&request);
    Ok(text.strip_prefix("GET ").and_then(|rest| rest.split_whitespace().next()).map(str::to_owned))
}

fn respond(stream: &mut TcpStream, status: &str, body: &str) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes())
}
