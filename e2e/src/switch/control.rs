//! The switch's control socket: one JSON request a line, one JSON answer a line.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{AddressMove, LinkState, Port, PortReport};
use crate::{Error, Result};

const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("switch.sock")
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    Report,
    Moves,
    Set { port: Port, link: LinkState },
}

/// A running switch, to be asked and changed.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
}

impl Control {
    /// The switch of the lab with this run folder.
    pub fn connect(run_dir: &Path) -> Result<Self> {
        Ok(Self { path: socket(run_dir) })
    }

    /// All its ports.
    pub fn report(&self) -> Result<Vec<PortReport>> {
        self.ask(&Request::Report)
    }

    /// Changes what one cable does; it holds when this returns.
    pub fn change(&self, port: Port, change: impl Fn(&mut LinkState)) -> Result<()> {
        let mut link = self
            .report()?
            .into_iter()
            .find(|r| r.port == port)
            .ok_or_else(|| Error::other(format!("the switch has no port {port}")))?
            .link;
        change(&mut link);
        self.ask::<Vec<PortReport>>(&Request::Set { port, link }).map(|_| ())
    }

    /// Every address's ports, in the order in which frames other than announcements came from there.
    pub fn moves(&self) -> Result<Vec<AddressMove>> {
        self.ask(&Request::Moves)
    }

    fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T> {
        let failed = |e| Error::io("cannot ask the switch at", &self.path)(e);
        let mut stream = UnixStream::connect(&self.path).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        let mut line = serde_json::to_string(request).map_err(|e| Error::other(e.to_string()))?;
        line.push('\n');
        stream.write_all(line.as_bytes()).map_err(failed)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).map_err(failed)?;
        serde_json::from_str(&answer)
            .map_err(|e| Error::other(format!("the switch answered {answer:?}: {e}")))
    }
}
