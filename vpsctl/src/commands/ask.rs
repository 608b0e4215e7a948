//! What is asked of the person at the terminal: a yes before content is lost, and passwords.

use std::io::{BufRead, IsTerminal, Read, Write};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::sync::oneshot;

use crate::{args::Yes, error::Error, wait::interrupts};

/// As the API has it.
const PASSWORD_BYTES_MAX: usize = 1 << 10;

/// Goes on with `--yes`, or when a person says so.
///
/// # Errors
/// Wrong usage where there is nobody to ask; otherwise an answer that is not yes.
pub(super) fn confirm(yes: Yes, what: &str) -> Result<(), Error> {
    if yes.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(Error::Usage(format!(
            "--yes: is missing: {what}, and there is no terminal to ask"
        )));
    }
    eprint!("{what}. Go on? [y/N] ");
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|e| Error::Local(format!("cannot read the terminal: {e}")))?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Error::Local("not confirmed: nothing was changed".to_owned())),
    }
}

/// A new password: typed twice and unseen on a terminal, else one line of the standard input.
pub(super) async fn new_password() -> Result<String, Error> {
    if !std::io::stdin().is_terminal() {
        let mut bytes = Vec::new();
        // With room for the line's end, and one to see that it is too much.
        let bytes_max = PASSWORD_BYTES_MAX as u64 + 3;
        std::io::stdin()
            .lock()
            .take(bytes_max)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::Local(format!("stdin: {e}")))?;
        return checked(bytes);
    }
    let mut interrupt = interrupts()?;
    let hidden = Hidden::enter()?;
    eprintln!("what is typed is not shown");
    let first = typed("New password: ", &mut interrupt).await?;
    let again = typed("Once more: ", &mut interrupt).await?;
    drop(hidden);
    if first != again {
        return Err(Error::Usage("password: the two are not the same; try again".to_owned()));
    }
    checked(first)
}

/// One line of the terminal. A thread of its own reads it, which ends with the process: a read
/// cannot be called off.
async fn typed(
    prompt: &str,
    interrupt: &mut tokio::signal::unix::Signal,
) -> Result<Vec<u8>, Error> {
    eprint!("{prompt}");
    let _ = std::io::stderr().flush();
    let (sender, line) = oneshot::channel();
    let read = move || {
        let mut bytes = Vec::new();
        let limit = PASSWORD_BYTES_MAX as u64 + 3;
        let read = std::io::stdin().lock().take(limit).read_until(b'\n', &mut bytes);
        let _ = sender.send(read.map(|_| bytes));
    };
    let failed = |e: std::io::Error| Error::Local(format!("cannot read the terminal: {e}"));
    std::thread::Builder::new().name("stdin".to_owned()).spawn(read).map_err(failed)?;
    let line = tokio::select! {
        line = line => line,
        _ = interrupt.recv() => {
            eprintln!();
            return Err(Error::Broken {
                what: "asking for the password".to_owned(),
                how: crate::error::Broken::Interrupted,
            });
        }
    };
    eprintln!();
    line.map_err(|_| Error::Local("cannot read the terminal".to_owned()))?.map_err(failed)
}

/// What was given is never repeated.
fn checked(mut bytes: Vec<u8>) -> Result<String, Error> {
    let refused = |why: &str| Err(Error::Usage(format!("password: {why}")));
    if bytes.ends_with(b"\n") {
        bytes.pop();
        if bytes.ends_with(b"\r") {
            bytes.pop();
        }
    }
    if bytes.is_empty() {
        return refused("is empty: one line of the standard input is expected");
    }
    if bytes.len() > PASSWORD_BYTES_MAX {
        return refused("is too long: at most 1 KiB is accepted");
    }
    if bytes.contains(&b'\n') {
        return refused("has more than one line: one is expected");
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => refused("is no text: UTF-8 is expected"),
    }
}

/// The terminal without echo; as it was when dropped.
struct Hidden {
    before: Termios,
}

impl Hidden {
    fn enter() -> Result<Self, Error> {
        let failed = |e| Error::Local(format!("cannot hide what is typed: {e}"));
        let before = tcgetattr(rustix::stdio::stdin()).map_err(failed)?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, &hidden).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One line, whatever its end; a refusal never repeats it.
    #[test]
    fn a_password_is_one_line() {
        for ok in ["secret", "secret\n", "secret\r\n"] {
            assert_eq!(checked(ok.into()).unwrap(), "secret");
        }
        assert_eq!(checked(vec![b'a'; 1024]).unwrap().len(), 1024);
        for (bad, expected) in [
            (&b""[..], "password: is empty"),
            (b"\n", "password: is empty"),
            (b"secret\nmore\n", "password: has more than one line"),
            (b"secret\xff", "password: is no text"),
            (b"secret\0", "password: is no text"),
            (&[b'a'; 1025], "password: is too long: at most 1 KiB"),
        ] {
            let error = checked(bad.into()).unwrap_err().to_string();
            assert!(error.starts_with(expected) && !error.contains("secret"), "{error}");
        }
    }
}
