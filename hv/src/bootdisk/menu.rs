//! GRUB's configuration, as far as `grub-mkconfig` writes it: running.
//!
//! What decides which kernel boots is run as GRUB would: conditions, variables, the environment
//! block, `search`, menu entries. What draws, waits or writes is passed over.
//!
//! Two things differ on purpose, because nothing is ever written to the disk here. `next_entry`
//! is meant for one boot and cleared by GRUB; it would hold for ever, so it is ignored. And
//! Ubuntu's cloud images first try without an initrd and note a failure on the disk;
//! `initrdfail` is set from the start, so that they boot with their initrd.

use super::Volume;
use super::bls::{self, INITRDS_MAX};
use super::grub::{self, Node, Piece, Variables, Word};

/// Most entries of a menu.
const ITEMS_MAX: usize = bls::ENTRIES_MAX;
/// Deepest submenu.
const SUBMENUS_MAX: u32 = 4;
/// Longest command with its values put in, bytes.
const COMMAND_BYTES_MAX: usize = 64 << 10;

/// What the script could not be run for.
pub(super) const COMMAND_TOO_LONG: &str = "a command is too long";

/// A kernel as an entry names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Linux {
    /// Index of the volume, and the path in it.
    pub(super) kernel: (usize, String),
    pub(super) initrds: Vec<(usize, String)>,
    pub(super) arguments: String,
}

/// A menu entry that has not been run.
struct Item<'a> {
    title: String,
    id: String,
    submenu: bool,
    body: &'a [Node],
}

/// A script that is run.
pub(super) struct Run<'a> {
    volumes: &'a [Volume],
    /// The volume and the directory of the script.
    home: usize,
    directory: String,
    pub(super) variables: Variables,
    items: Vec<Item<'a>>,
    linux: Option<Linux>,
    /// The menu is to be filled with entries of the Boot Loader Specification.
    pub(super) wants_bls: bool,
}

impl<'a> Run<'a> {
    /// Runs a script up to its menu.
    pub(super) fn start(
        volumes: &'a [Volume],
        home: usize,
        directory: &str,
        script: &'a [Node],
    ) -> Result<Self, &'static str> {
        let mut variables = Variables::default();
        for (name, value) in [
            ("feature_menuentry_id", "y"),
            ("feature_platform_search_hint", "y"),
            ("feature_timeout_style", "y"),
            ("grub_cpu", "x86_64"),
            ("grub_platform", "pc"),
            ("initrdfail", "1"),
        ] {
            variables.set(name, value);
        }
        variables.set("root", device(home));
        for name in ["prefix", "config_directory"] {
            variables.set(name, format!("({}){directory}", device(home)));
        }
        let mut run = Self::with(volumes, home, directory, variables);
        run.block(script)?;
        Ok(run)
    }

    fn with(volumes: &'a [Volume], home: usize, directory: &str, variables: Variables) -> Self {
        let directory = directory.to_owned();
        let (items, linux, wants_bls) = (Vec::new(), None, false);
        Self { volumes, home, directory, variables, items, linux, wants_bls }
    }

    pub(super) fn has_menu(&self) -> bool {
        !self.items.is_empty()
    }

    /// The entry that GRUB would boot: the default, or the first. One that boots no Linux is
    /// passed over.
    pub(super) fn choose(&self) -> Result<Option<(String, Linux)>, &'static str> {
        self.choose_by(self.variables.get("default"), 0)
    }

    fn choose_by(&self, wanted: &str, depth: u32) -> Result<Option<(String, Linux)>, &'static str> {
        let (head, rest) = wanted.split_once('>').unwrap_or((wanted, ""));
        let named = self.items.iter().position(|item| item.id == head || item.title == head);
        let default = named.filter(|_| !head.is_empty()).or_else(|| head.parse().ok());
        let default = default.filter(|index| *index < self.items.len()).unwrap_or(0);
        let others = (0..self.items.len()).filter(|index| *index != default);
        for index in std::iter::once(default).chain(others) {
            let Some(item) = self.items.get(index) else { break };
            let variables = self.variables.clone();
            let mut run = Self::with(self.volumes, self.home, &self.directory, variables);
            run.block(item.body)?;
            if let Some(linux) = run.linux {
                return Ok(Some((item.title.clone(), linux)));
            }
            if item.submenu && depth < SUBMENUS_MAX {
                let rest = if index == default { rest } else { "" };
                if let Some((title, linux)) = run.choose_by(rest, depth + 1)? {
                    return Ok(Some((format!("{}>{title}", item.title), linux)));
                }
            }
        }
        Ok(None)
    }

    /// Runs statements; answers whether the last succeeded.
    fn block(&mut self, nodes: &'a [Node]) -> Result<bool, &'static str> {
        let mut succeeded = true;
        for node in nodes {
            succeeded = match node {
                Node::Command(words) => {
                    let words = self.words(words)?;
                    self.command(&words)
                }
                Node::If(branches, otherwise) => self.conditional(branches, otherwise)?,
                Node::Menu { submenu, arguments, body } => {
                    let arguments = self.words(arguments)?;
                    self.add_item(&arguments, *submenu, body);
                    true
                }
            };
        }
        Ok(succeeded)
    }

    fn conditional(
        &mut self,
        branches: &'a [(Vec<Node>, Vec<Node>)],
        otherwise: &'a [Node],
    ) -> Result<bool, &'static str> {
        for (condition, body) in branches {
            if self.block(condition)? {
                return self.block(body);
            }
        }
        self.block(otherwise)
    }

    fn words(&self, words: &[Word]) -> Result<Vec<String>, &'static str> {
        let mut result = Vec::new();
        let mut bytes = 0;
        for word in words {
            let mut text = String::new();
            // An unquoted variable without a value makes no word at all.
            let mut exists = false;
            for piece in word {
                match piece {
                    Piece::Text(piece) => {
                        text.push_str(piece);
                        exists = true;
                    }
                    Piece::Variable { name, quoted: true } => {
                        text.push_str(self.variables.get(name));
                        exists = true;
                    }
                    Piece::Variable { name, quoted: false } => {
                        let value = self.variables.get(name);
                        let mut parts = value.split_whitespace();
                        if let Some(first) = parts.next() {
                            text.push_str(first);
                            exists = true;
                        }
                        for part in parts {
                            bytes += text.len() + 1;
                            result.push(std::mem::replace(&mut text, part.to_owned()));
                        }
                    }
                }
                if bytes + text.len() > COMMAND_BYTES_MAX {
                    return Err(COMMAND_TOO_LONG);
                }
            }
            if exists {
                bytes += text.len() + 1;
                result.push(text);
            }
        }
        Ok(result)
    }

    fn command(&mut self, words: &[String]) -> bool {
        let Some((name, arguments)) = words.split_first() else { return true };
        match name.as_str() {
            "set" => {
                if let Some((name, value)) = arguments.first().and_then(|a| a.split_once('=')) {
                    self.variables.set(name, value);
                }
                true
            }
            "[" => {
                let end = arguments.len().saturating_sub(1);
                arguments.last().is_some_and(|last| last == "]") && self.test(&arguments[..end])
            }
            "test" => self.test(arguments),
            "true" => true,
            "load_env" => self.load_environment(arguments),
            "blscfg" => {
                self.wants_bls = true;
                true
            }
            "search" => self.search(arguments),
            "search.fs_uuid" => self.search_as("--fs-uuid", arguments),
            "search.fs_label" => self.search_as("--label", arguments),
            "search.file" => self.search_as("--file", arguments),
            "linux" | "linux16" | "linuxefi" => self.linux(arguments),
            "initrd" | "initrd16" | "initrdefi" => self.initrd(arguments),
            // Modules, drawing and the like; as conditions they say no.
            "insmod" | "export" | "echo" | "load_video" => true,
            _ => match name.split_once('=') {
                Some((name, value)) => {
                    self.variables.set(name, value);
                    true
                }
                None => false,
            },
        }
    }

    fn add_item(&mut self, arguments: &[String], submenu: bool, body: &'a [Node]) {
        let (mut title, mut id) = (None, None);
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--id" => id = arguments.next().cloned(),
                "--class" | "--users" | "--hotkey" | "--source" => drop(arguments.next()),
                option if option.starts_with("--") => {
                    if let Some(value) = option.strip_prefix("--id=") {
                        id = Some(value.to_owned());
                    }
                }
                _ => {
                    title.get_or_insert_with(|| argument.clone());
                }
            }
        }
        if self.items.len() < ITEMS_MAX {
            let (title, id) = (title.unwrap_or_default(), id.unwrap_or_default());
            self.items.push(Item { title, id, submenu, body });
        }
    }

    /// `[ … ]`: alternatives of things that must all hold.
    fn test(&self, arguments: &[String]) -> bool {
        arguments.split(|word| word == "-o").any(|all| {
            all.split(|word| word == "-a").all(|one| {
                let negations = one.iter().take_while(|word| *word == "!").count();
                self.test_one(&one[negations..]) != (negations % 2 == 1)
            })
        })
    }

    fn test_one(&self, words: &[String]) -> bool {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words[..] {
            [a, "=" | "==", b] => a == b,
            [a, "!=", b] => a != b,
            ["-z", text] => text.is_empty(),
            ["-n", text] => !text.is_empty(),
            ["-e" | "-f" | "-s" | "-d", path] => {
                let Some((volume, path)) = self.locate(path) else { return false };
                self.volumes[volume].filesystem.exists(&path).unwrap_or(false)
            }
            [text] => !text.is_empty() && text != "-n",
            _ => false,
        }
    }

    fn load_environment(&mut self, arguments: &[String]) -> bool {
        let mut path = format!("({}){}/grubenv", device(self.home), self.directory);
        let mut names: Vec<&str> = Vec::new();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "-f" | "--file" => path = arguments.next().cloned().unwrap_or_default(),
                option if option.starts_with('-') => {
                    if let Some(file) = option.strip_prefix("--file=") {
                        file.clone_into(&mut path);
                    }
                }
                name => names.push(name),
            }
        }
        let Some((volume, path)) = self.locate(&path) else { return false };
        let Some(environment) = environment(&self.volumes[volume], &path) else { return false };
        for (name, value) in environment.iter() {
            let is_for_us = names.is_empty() || names.contains(&name);
            if is_for_us && !["next_entry", "prev_entry", "initrdfail"].contains(&name) {
                self.variables.set(name, value);
            }
        }
        true
    }

    fn search_as(&mut self, kind: &str, arguments: &[String]) -> bool {
        let variable = arguments.get(1).map_or("root", String::as_str);
        let Some(wanted) = arguments.first() else { return false };
        self.set_volume(kind, wanted, variable)
    }

    fn search(&mut self, arguments: &[String]) -> bool {
        let (mut kind, mut variable, mut wanted) = ("--file", None, None);
        let mut arguments = arguments.iter().peekable();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "-u" | "--fs-uuid" => kind = "--fs-uuid",
                "-l" | "--label" | "--fs-label" => kind = "--label",
                "-f" | "--file" => kind = "--file",
                "-s" | "--set" => variable = Some("root"),
                "--hint" => drop(arguments.next()),
                option if option.starts_with('-') => {
                    variable = option.strip_prefix("--set=").or(variable);
                }
                name => wanted = Some(name),
            }
        }
        match (wanted, variable) {
            (Some(wanted), Some(variable)) => self.set_volume(kind, wanted, variable),
            _ => false,
        }
    }

    fn set_volume(&mut self, kind: &str, wanted: &str, variable: &str) -> bool {
        let found = self.volumes.iter().position(|volume| match kind {
            "--fs-uuid" => volume.filesystem.uuid().eq_ignore_ascii_case(wanted),
            "--label" => volume.filesystem.label() == wanted,
            _ => volume.filesystem.exists(wanted).unwrap_or(false),
        });
        match found {
            Some(index) => {
                self.variables.set(variable, device(index));
                true
            }
            None => false,
        }
    }

    fn linux(&mut self, arguments: &[String]) -> bool {
        let Some((path, arguments)) = arguments.split_first() else { return false };
        let quoted = |argument: &String| match argument.contains(char::is_whitespace) {
            true => format!("\"{argument}\""),
            false => argument.clone(),
        };
        let arguments: Vec<String> = arguments.iter().map(quoted).collect();
        let kernel = self.locate(path).unwrap_or_else(|| (self.home, path.clone()));
        let arguments = arguments.join(" ");
        self.linux = Some(Linux { kernel, initrds: Vec::new(), arguments });
        true
    }

    fn initrd(&mut self, arguments: &[String]) -> bool {
        let locate = |path: &String| self.locate(path).unwrap_or_else(|| (self.home, path.clone()));
        let initrds = arguments.iter().filter(|a| !a.starts_with("--")).take(INITRDS_MAX);
        let initrds: Vec<_> = initrds.map(locate).collect();
        match &mut self.linux {
            Some(linux) => {
                linux.initrds = initrds;
                true
            }
            None => false,
        }
    }

    /// The volume and the path in it, of `(device)/path` or `/path`.
    fn locate(&self, path: &str) -> Option<(usize, String)> {
        let (name, path) = match path.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((name, path)) => (name, path),
            None => (self.variables.get("root"), path),
        };
        Some((self.volume(name)?, path.to_owned()))
    }

    /// The volume of a device: ours, or GRUB's name of a partition on the first disk.
    fn volume(&self, name: &str) -> Option<usize> {
        if let Some(index) = name.strip_prefix("volume").and_then(|index| index.parse().ok()) {
            return Some(index).filter(|index: &usize| *index < self.volumes.len());
        }
        let (_, partition) = name.split_once(',')?;
        let digits = partition.trim_start_matches(|c: char| c.is_ascii_alphabetic());
        let number = digits.parse::<u32>().ok()?;
        self.volumes.iter().position(|volume| volume.number == Some(number))
    }
}

/// How a volume is called in variables such as `root`.
fn device(volume: usize) -> String {
    format!("volume{volume}")
}

/// The variables of an environment block, if one is there.
pub(super) fn environment(volume: &Volume, path: &str) -> Option<Variables> {
    let block = volume.filesystem.read_if_there(path, grub::ENVIRONMENT_BYTES_MAX).ok()??;
    Some(Variables::from_environment(&block))
}
