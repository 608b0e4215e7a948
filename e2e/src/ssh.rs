//! Commands on a host, over one SSH connection that stays open.
//!
//! A handshake costs an emulated host most of a second, so one is made when the host is up and
//! every command uses it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::netns::Netns;
use crate::process::{run, wait_for};
use crate::{Error, Result};

/// How to reach one host.
#[derive(Debug, Clone)]
pub struct Ssh {
    /// Where this machine meets the host.
    pub netns: Netns,
    /// Its management address.
    pub address: String,
    /// The key that logs in.
    pub key: PathBuf,
    /// The hosts' public key.
    pub known_hosts: PathBuf,
    /// The socket of the open connection.
    pub control: PathBuf,
}

impl Ssh {
    /// `ssh` with this host as its target and these words as the remote command.
    pub fn command(&self, words: &[String]) -> Result<Command> {
        let mut command = self.base()?;
        command.arg(format!("root@{}", self.address)).arg("--").args(words);
        Ok(command)
    }

    fn base(&self) -> Result<Command> {
        let mut command = self.netns.command("ssh")?;
        command.arg("-F").arg("none").arg("-i").arg(&self.key);
        for option in [
            "BatchMode=yes".to_owned(),
            "ConnectTimeout=20".to_owned(),
            "ServerAliveInterval=15".to_owned(),
            "ServerAliveCountMax=4".to_owned(),
            "LogLevel=ERROR".to_owned(),
            "Ciphers=aes128-gcm@openssh.com,chacha20-poly1305@openssh.com".to_owned(),
            "KexAlgorithms=curve25519-sha256".to_owned(),
            format!("UserKnownHostsFile={}", self.known_hosts.display()),
            format!("ControlPath={}", self.control.display()),
        ] {
            command.arg("-o").arg(option);
        }
        Ok(command)
    }

    /// Waits until the host answers and opens the connection.
    pub fn connect(&self, patience: Duration) -> Result<()> {
        let what = format!("SSH on {}", self.address);
        let target = (self.address.as_str(), 22);
        self.netns.run(|| {
            wait_for(&what, patience, || {
                use std::net::{TcpStream, ToSocketAddrs as _};
                let Some(address) = target.to_socket_addrs().ok().and_then(|mut a| a.next()) else {
                    return Err(Error::other(format!("{}: not an address", self.address)));
                };
                Ok(TcpStream::connect_timeout(&address, Duration::from_millis(500)).ok())
            })
        })?;
        self.disconnect();
        wait_for(&what, patience, || {
            let mut command = self.base()?;
            command.args(["-M", "-N", "-f", &format!("root@{}", self.address)]);
            // The connection outlives this program: it must not hold its pipes.
            let status = command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .map_err(Error::io("cannot run", "ssh"))?;
            Ok(status.success().then_some(()))
        })
    }

    /// Closes the open connection, if there is one.
    pub fn disconnect(&self) {
        if self.control.exists()
            && let Ok(mut command) = self.base()
        {
            // A connection that is gone already is what was wanted.
            let _ = run(command.args(["-O", "exit", &format!("root@{}", self.address)]));
            let _ = std::fs::remove_file(&self.control);
        }
    }

    /// Runs a shell command line; its standard output, or what went wrong.
    pub fn run(&self, script: &str) -> Result<String> {
        run(&mut self.command(&[script.to_owned()])?)
    }

    /// Runs a shell command line with `input` on its standard input.
    pub fn run_with_input(&self, script: &str, input: &[u8]) -> Result<Output> {
        let mut child = self
            .command(&[script.to_owned()])?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Error::io("cannot run", "ssh"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A command that does not read to the end says why in its status.
            let _ = stdin.write_all(input);
        }
        child.wait_with_output().map_err(Error::io("cannot wait for", "ssh"))
    }

    /// Copies a file to the host, with its permissions; whoever runs the old one keeps it.
    pub fn push(&self, from: &Path, to: &str) -> Result<()> {
        let content = std::fs::read(from).map_err(Error::io("cannot read", from))?;
        let mode = {
            use std::os::unix::fs::PermissionsExt as _;
            let meta = std::fs::metadata(from).map_err(Error::io("cannot read", from))?;
            meta.permissions().mode() & 0o777
        };
        let script = format!(
            "set -e; to={to}; [ ! -d \"$to\" ] || to=\"$to\"/{name}; mkdir -p \"$(dirname \"$to\")\"; \
             cat > \"$to.new\"; chmod {mode:o} \"$to.new\"; mv -f \"$to.new\" \"$to\"",
            to = quote(to),
            name = quote(&from.file_name().unwrap_or_default().to_string_lossy()),
        );
        let output = self.run_with_input(&script, &content)?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::Program {
            program: format!("push {} to {}:{to}", from.display(), self.address),
            reason: String::from_utf8_lossy(&output.stderr).trim_end().to_owned(),
        })
    }
}

/// One word for a shell, whatever is in it.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
