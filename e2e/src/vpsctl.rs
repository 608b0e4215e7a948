//! The real `vpsctl`, run in the namespace.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::netns::Netns;
use crate::{Error, Result, paths};

/// How to call it.
#[derive(Debug, Clone)]
pub struct Vpsctl {
    netns: Netns,
    servers: String,
}

/// What it said and how it ended.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its exit code; 255 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Vpsctl {
    /// Against these controllers.
    pub fn new(netns: Netns, servers: String) -> Self {
        Self { netns, servers }
    }

    /// The command, to be run in another way than here.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.netns.command(paths::program("vpsctl"))?;
        command.env("DROVER_SERVER", &self.servers).args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs it; any exit code is an answer.
    pub fn call(&self, arguments: &[&str]) -> Result<Answer> {
        let output: Output = self
            .command(arguments)?
            .output()
            .map_err(|e| Error::other(format!("cannot run vpsctl: {e}")))?;
        Ok(Answer {
            code: output.status.code().unwrap_or(255),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs it and expects success; what it said.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let answer = self.call(arguments)?;
        if answer.code == 0 {
            return Ok(answer.out);
        }
        Err(Error::Program {
            program: format!("vpsctl {}", arguments.join(" ")),
            reason: format!("exit code {}: {}", answer.code, answer.err.trim_end()),
        })
    }

    /// Runs it with `-o json` and expects success.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = vec!["-o", "json", "--timeout", "20s"];
        all.extend(arguments);
        let out = self.run(&all)?;
        serde_json::from_str(&out)
            .map_err(|e| Error::other(format!("vpsctl {}: {e} in {out:?}", arguments.join(" "))))
    }

    /// Starts something with `--detach`; the operation's name.
    pub fn start(&self, arguments: &[&str]) -> Result<String> {
        let mut all = arguments.to_vec();
        all.push("--detach");
        let operation = self.json(&all)?;
        operation["name"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| Error::other(format!("vpsctl {}: {operation}", arguments.join(" "))))
    }
}
