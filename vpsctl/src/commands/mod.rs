//! The commands, one module a noun.

mod ask;
mod backup;
mod cluster;
mod console;
mod domain;
mod events;
mod files;
mod image;
mod import;
mod lifecycle;
mod network;
mod node;
mod operation;
mod snapshot;
mod storage;

use crate::{
    args::{Cli, Command, Output},
    client::Cluster,
    error::Error,
    out::print,
};

/// What every command has at hand.
pub(crate) struct Context {
    pub(crate) cluster: Cluster,
    pub(crate) json: bool,
}

impl Context {
    /// Prints one of the two forms; the other is not made.
    pub(crate) fn answer(
        &self,
        json: impl FnOnce() -> Result<String, Error>,
        page: impl FnOnce() -> String,
    ) -> Result<(), Error> {
        print(&if self.json { json()? } else { page() })
    }

    /// The answer when something is gone: its name for programs, a sentence for people.
    fn gone(&self, name: &str, sentence: &str) -> Result<(), Error> {
        let json = || Ok(format!("{}\n", serde_json::json!({ "name": name })));
        self.answer(json, || format!("{sentence}\n"))
    }
}

/// Asks for one page after the other, until there is no next one.
macro_rules! all_pages {
    ($context:expr, $client:ident :: $method:ident, $request:expr, $items:ident) => {{
        let mut items = Vec::new();
        let mut request = $request;
        request.page_size = $crate::commands::PAGE_SIZE;
        loop {
            let page = $crate::commands::call!($context, $client::$method, request.clone())?;
            items.extend(page.$items);
            if page.next_page_token.is_empty() {
                break items;
            }
            request.page_token = page.next_page_token;
        }
    }};
}
pub(crate) use all_pages;

/// Asks for one thing, at whatever member answers, with the patience of `call` or of what is named.
macro_rules! call {
    ($context:expr, $client:ident :: $method:ident, $request:expr) => {
        $crate::commands::call!($context, call, $client::$method, $request)
    };
    ($context:expr, $call:ident, $client:ident :: $method:ident, $request:expr) => {{
        let request = $request;
        $context
            .cluster
            .$call(|rpc| {
                let request = request.clone();
                async move {
                    let client = $client::new(rpc);
                    client
                        .max_decoding_message_size($crate::client::MESSAGE_BYTES_MAX)
                        .$method(request)
                        .await
                }
            })
            .await
    }};
}
pub(crate) use call;

pub(crate) const PAGE_SIZE: u32 = 100;

/// A mutation's id: sent again with each attempt, so that it is done once.
pub(crate) fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Runs the command.
pub(crate) async fn run(cli: Cli) -> Result<(), Error> {
    let cluster = Cluster::new(&cli.global.server, cli.global.timeout)?;
    let context = Context { cluster, json: cli.global.output == Output::Json };
    match cli.command {
        Command::Node(command) => node::run(&context, command).await,
        Command::Domain(command) => domain::run(&context, command).await,
        Command::Image(command) => image::run(&context, command).await,
        Command::Volume(command) => storage::volume(&context, command).await,
        Command::Snapshot(command) => snapshot::run(&context, command).await,
        Command::Backup(command) => backup::run(&context, command).await,
        Command::Pool(command) => storage::pool(&context, command).await,
        Command::Network(command) => network::run(&context, command).await,
        Command::Operation(command) => operation::run(&context, command).await,
        Command::Cluster(command) => cluster::run(&context, command).await,
        Command::Events(args) => events::run(&context, &args).await,
        Command::Completions { .. } => Ok(()),
    }
}
