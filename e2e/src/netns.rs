//! The network namespace in which this machine takes part in the lab.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::Command;

use rustix::thread::LinkNameSpaceType;

use crate::process::run;
use crate::{Error, Result};

/// A namespace by name, as `ip netns` knows it.
#[derive(Debug, Clone)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Names it; nothing is made.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Makes it, with `lo` up.
    pub fn create(&self) -> Result<()> {
        run(Command::new("ip").args(["netns", "add", &self.name]))?;
        self.ip(&["link", "set", "lo", "up"])
    }

    /// Removes it, if it is there.
    pub fn delete(&self) -> Result<()> {
        if self.exists() {
            run(Command::new("ip").args(["netns", "del", &self.name]))?;
        }
        Ok(())
    }

    /// Runs `ip` on it.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        run(Command::new("ip").args(["-n", &self.name]).args(arguments)).map(|_| ())
    }

    /// Moves the calling thread into it, for good. Sockets that it opens from now on are there.
    pub fn enter(&self) -> Result<()> {
        let file = File::open(self.path()).map_err(Error::io("cannot open", self.path()))?;
        rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|e| Error::other(format!("cannot enter namespace {}: {e}", self.name)))
    }

    /// A command that will run in it.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        use std::os::unix::process::CommandExt as _;
        let file = File::open(self.path()).map_err(Error::io("cannot open", self.path()))?;
        let mut command = Command::new(program);
        // SAFETY: setns is a plain system call; the descriptor lives in the closure.
        unsafe {
            command.pre_exec(move || {
                Ok(rustix::thread::move_into_link_name_space(
                    file.as_fd(),
                    Some(LinkNameSpaceType::Network),
                )?)
            });
        }
        Ok(command)
    }

    /// Runs `work` on a thread of its own in the namespace, and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter()?;
                    work()
                })
                .join()
                .unwrap_or_else(|_| Err(Error::other("the thread in the namespace panicked")))
        })
    }
}
