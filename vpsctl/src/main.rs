//! `vpsctl`: the command line of Drover.
//!
//! [`args`] defines every command and flag with its help. A command of `commands/` turns them
//! into calls of the API through [`client`], which asks the cluster's members in turn, and what
//! comes back into text through [`out`]: tables and sentences, or JSON. Commands that change
//! something get an operation, and [`wait`] follows it to its end, with [`progress`] on stderr;
//! the import of an image is one call, with
//! [`transfer`] on stderr; a backup is several, and [`backup`] has the directory that it goes into.
//! [`error`] maps every failure to one line and an exit code.
//!
//! Of the cluster it knows the API alone (`drover-proto`): whatever it does, a billing system can do too.

mod args;
mod backup;
mod client;
mod commands;
mod error;
mod out;
mod parse;
mod progress;
mod transfer;
mod wait;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tracing::Instrument;

use crate::{
    args::{Cli, Command},
    error::{Error, Exit},
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Completions { shell } = cli.command {
        return end(completions(shell));
    }
    end(run(cli))
}

fn completions(shell: clap_complete::Shell) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "vpsctl", &mut script);
    out::print_bytes(&script)
}

/// The process's last words and its code.
fn end(result: Result<(), Error>) -> ExitCode {
    let code = match result {
        Ok(()) => Exit::Ok,
        Err(error) => {
            let code = error.exit();
            if !matches!(error, Error::PipeClosed) {
                eprintln!("error: {error}");
                if let Some(hint) = error.hint() {
                    eprintln!("hint: {hint}");
                }
            }
            code
        }
    };
    ExitCode::from(code as u8)
}

fn run(cli: Cli) -> Result<(), Error> {
    let local = |e: std::io::Error| Error::Local(format!("cannot start: {e}"));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(local)?;
    let _telemetry = telemetry()?;
    runtime.block_on(commands::run(cli).instrument(tracing::info_span!("vpsctl")))
}

/// A command for people keeps silent: logs and traces only where somebody asked for them.
fn telemetry() -> Result<Option<drover_telemetry::Guard>, Error> {
    let wanted = [drover_telemetry::ENV_LOG, drover_telemetry::ENV_OTLP_ENDPOINT]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|v| !v.is_empty()));
    if !wanted {
        return Ok(None);
    }
    drover_telemetry::init("vpsctl", None).map(Some).map_err(|e| Error::Local(e.to_string()))
}
