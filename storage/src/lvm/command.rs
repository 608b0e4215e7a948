//! Running LVM's tools: in the C locale, with bounded output, and never longer than a deadline.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::report;
use crate::{PoolError, Result};

/// A command may wait for others that hold the volume group's lock.
pub(super) const COMMAND_TIME_MAX: Duration = Duration::from_secs(120);
/// What a tool gets to end by itself after its deadline. LVM puts SIGTERM off while it has
/// devices suspended; killed there, it would leave them so.
const TERM_TIME_MAX: Duration = Duration::from_secs(20);
/// A row of a report has less than a kilobyte: some ten thousand volumes.
const STDOUT_BYTES_MAX: usize = 16 << 20;
/// Of a tool's complaints this much is kept.
const STDERR_BYTES_MAX: usize = 2 << 10;
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs `lvm` with these arguments and answers its standard output.
pub(super) fn lvm(args: &[&str]) -> Result<Vec<u8>> {
    run("lvm", args, COMMAND_TIME_MAX)
}

fn run(program: &str, args: &[&str], time_max: Duration) -> Result<Vec<u8>> {
    let command = format!("{program} {}", args.join(" "));
    let failed = |detail: String| PoolError::Command {
        command: command.clone(),
        status: "no exit status".into(),
        stderr: detail,
    };
    let child = Command::new(program)
        .args(args)
        .env_clear()
        .envs([("PATH", PATH), ("LC_ALL", "C"), ("LVM_SUPPRESS_FD_WARNINGS", "1")])
        .current_dir("/")
        // Ctrl-C is for us to handle: the tool is not to be torn out of its work.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("cannot start {program}: {error}")))?;
    let ended = watch(child, time_max).map_err(|error| failed(error.to_string()))?;
    let mut stderr = String::from_utf8_lossy(&ended.stderr).trim().replace('\n', "; ");
    if ended.late {
        return Err(PoolError::Timeout { what: command, seconds: time_max.as_secs() });
    }
    if ended.overflow {
        let detail = format!("it is longer than {STDOUT_BYTES_MAX} bytes");
        return Err(PoolError::Report { command, detail });
    }
    if !ended.status.success() {
        if stderr.is_empty() {
            // With JSON, LVM's complaints are part of it.
            stderr = report::complaints(&ended.stdout);
        }
        return Err(PoolError::Command { command, status: ended.status.to_string(), stderr });
    }
    Ok(ended.stdout)
}

struct Ended {
    status: std::process::ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    late: bool,
    overflow: bool,
}

/// Collects what the child says until it ends, by itself or by its deadline.
fn watch(mut child: Child, time_max: Duration) -> io::Result<Ended> {
    let result = collect(&mut child, time_max);
    if result.is_err() {
        // Nobody would look after it any more.
        let _ = child.kill();
    }
    let status = child.wait()?;
    result.map(|(stdout, stderr, late, overflow)| Ended { status, stdout, stderr, late, overflow })
}

type Collected = (Vec<u8>, Vec<u8>, bool, bool);

fn collect(child: &mut Child, time_max: Duration) -> io::Result<Collected> {
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let pipes = [stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)];
    for pipe in pipes.into_iter().flatten() {
        rustix::io::ioctl_fionbio(pipe, true)?;
    }
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (mut late, mut overflow) = (false, false);
    let mut deadline = Instant::now() + time_max;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            if late {
                child.kill()?;
                return Ok((out, err, late, overflow));
            }
            late = true;
            deadline = Instant::now() + TERM_TIME_MAX;
            kill_process(pid, Signal::TERM)?;
            continue;
        }
        let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
        fds.extend(stdout.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        fds.extend(stderr.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let timeout =
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ended = !fds[0].revents().is_empty();
        // What it said before it ended is read after that was seen.
        overflow |= drain(&mut stdout, &mut out, STDOUT_BYTES_MAX)?;
        drain(&mut stderr, &mut err, STDERR_BYTES_MAX)?;
        if ended {
            return Ok((out, err, late, overflow));
        }
    }
}

/// Reads what is there, keeps the first `bytes_max`, and closes at the end. True when something
/// was dropped.
fn drain(pipe: &mut Option<impl Read>, kept: &mut Vec<u8>, bytes_max: usize) -> io::Result<bool> {
    let mut dropped = false;
    let mut piece = [0; 16 << 10];
    while let Some(open) = pipe {
        match open.read(&mut piece) {
            Ok(0) => *pipe = None,
            Ok(count) => {
                let room = (bytes_max - kept.len()).min(count);
                kept.extend_from_slice(&piece[..room]);
                dropped |= room < count;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(dropped)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, time_max: Duration) -> Result<Vec<u8>> {
        run("sh", &["-c", script], time_max)
    }

    #[test]
    fn output_comes_back_and_failure_carries_what_was_said() {
        let minute = Duration::from_secs(60);
        assert_eq!(sh("echo $LC_ALL; echo noise >&2", minute).unwrap(), b"C\n");
        let error = sh("echo one >&2; echo two >&2; exit 5", minute).unwrap_err().to_string();
        assert!(error.contains("exit status: 5") && error.contains("one; two"), "{error}");
        let error = run("no-such-program", &[], minute).unwrap_err().to_string();
        assert!(error.contains("cannot start no-such-program"), "{error}");
    }

    #[test]
    fn more_than_a_pipe_holds_is_read_and_too_much_is_refused() {
        let minute = Duration::from_secs(60);
        let out = sh("head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2", minute).unwrap();
        assert_eq!(out.len(), 300_000);
        let error = sh("head -c 17000000 /dev/zero", minute).unwrap_err();
        assert!(matches!(error, PoolError::Report { .. }), "{error}");
    }

    #[test]
    fn a_command_ends_by_its_deadline() {
        let started = Instant::now();
        let error = sh("exec sleep 1000", Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error, PoolError::Timeout { .. }), "{error}");
        assert!(started.elapsed() < TERM_TIME_MAX, "SIGTERM is enough for most");
    }
}
