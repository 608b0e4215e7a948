//! GRUB's configuration, as far as `grub-mkconfig` writes it: reading.
//!
//! It is a shell script. [`parse`] makes a tree of it; [`super::menu`] runs that tree. Loops and
//! functions are read over, not run: nothing that chooses a kernel is in them.

use std::collections::BTreeMap;

/// Largest `grub.cfg`, bytes.
pub(super) const CONFIG_BYTES_MAX: u64 = 256 << 10;
/// Most words and ends of statements in one: a tree takes many times the memory of its text.
const TOKENS_MAX: usize = 1 << 16;
/// GRUB's environment block has exactly so many bytes; more than a few blocks is none.
pub(super) const ENVIRONMENT_BYTES_MAX: u64 = 64 << 10;
/// Deepest nesting of blocks.
const DEPTH_MAX: u32 = 16;
/// Most variables, longest value, and all values and names together, bytes.
const VARIABLES_MAX: usize = 1024;
const VALUE_BYTES_MAX: usize = 4096;
const VARIABLES_BYTES_MAX: usize = 64 << 10;

/// GRUB's variables. One that would be too much is not set.
#[derive(Debug, Clone, Default)]
pub(super) struct Variables {
    values: BTreeMap<String, String>,
    bytes: usize,
}

impl Variables {
    /// Of an environment block: `name=value` lines after a first line that begins with `#`.
    pub(super) fn from_environment(block: &[u8]) -> Self {
        let text = String::from_utf8_lossy(block);
        let mut variables = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some((name, value)) = line.split_once('=') {
                // A backslash stands before one that is meant, and before a line feed.
                variables.set(name, value.replace("\\\\", "\\"));
            }
        }
        variables
    }

    pub(super) fn get(&self, name: &str) -> &str {
        self.values.get(name).map_or("", String::as_str)
    }

    pub(super) fn set(&mut self, name: &str, value: impl Into<String>) {
        let value = value.into();
        let old = self.values.get(name).map_or(0, |old| name.len() + old.len());
        let bytes = self.bytes - old + name.len() + value.len();
        if value.len() <= VALUE_BYTES_MAX
            && bytes <= VARIABLES_BYTES_MAX
            && (self.values.len() < VARIABLES_MAX || self.values.contains_key(name))
        {
            self.bytes = bytes;
            self.values.insert(name.to_owned(), value);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Puts values in place of `$name` and `${name}`; a variable that is not set is empty. The
    /// result is bounded.
    pub(super) fn expand(&self, text: &str) -> String {
        let mut result = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('$').filter(|_| result.len() <= VALUE_BYTES_MAX) {
            result.push_str(&rest[..at]);
            match variable(&rest[at..]) {
                Some((name, length)) => {
                    result.push_str(self.get(name));
                    rest = &rest[at + length..];
                }
                None => {
                    result.push('$');
                    rest = &rest[at + 1..];
                }
            }
        }
        result.push_str(rest);
        result
    }
}

/// The name of a variable at the start of a text that begins with `$`, and what it takes, bytes.
fn variable(text: &str) -> Option<(&str, usize)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let after = text.strip_prefix('$')?;
    if let Some(braced) = after.strip_prefix('{') {
        let (name, _) = braced.split_once('}')?;
        return name.chars().all(is_name).then_some((name, name.len() + 3));
    }
    if after.starts_with('?') {
        return Some((&after[..1], 2));
    }
    let length = after.find(|c| !is_name(c)).unwrap_or(after.len());
    (length > 0).then_some((&after[..length], length + 1))
}

/// A word: pieces side by side.
pub(super) type Word = Vec<Piece>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    Text(String),
    /// A variable; its value is split at blanks when it is not quoted.
    Variable {
        name: String,
        quoted: bool,
    },
}

/// A statement.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Node {
    Command(Vec<Word>),
    /// Conditions with what they guard, in turn, and what is done otherwise.
    If(Vec<(Vec<Node>, Vec<Node>)>, Vec<Node>),
    /// `menuentry` or `submenu`: its arguments and its block.
    Menu {
        submenu: bool,
        arguments: Vec<Word>,
        body: Vec<Node>,
    },
}

/// What is wrong with a script.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub(super) struct SyntaxError {
    line: usize,
    what: &'static str,
}

#[derive(Debug)]
enum Token {
    Word(Word, usize),
    /// A line feed or a semicolon.
    End,
}

/// Makes a tree of a script.
pub(super) fn parse(text: &str) -> Result<Vec<Node>, SyntaxError> {
    let tokens = Lexer { text: text.chars().peekable(), line: 1 }.tokens()?;
    let mut parser = Parser { tokens: tokens.into_iter().peekable(), line: 1 };
    let nodes = parser.block(&[], 0)?;
    if parser.tokens.next().is_some() {
        return Err(parser.error("a block ends that has not begun"));
    }
    Ok(nodes)
}

struct Lexer<'a> {
    text: std::iter::Peekable<std::str::Chars<'a>>,
    line: usize,
}

impl Lexer<'_> {
    fn tokens(mut self) -> Result<Vec<Token>, SyntaxError> {
        let mut tokens = Vec::new();
        while let Some(next) = self.text.peek().copied() {
            if tokens.len() == TOKENS_MAX {
                return Err(self.error("the script is too long"));
            }
            match next {
                '\n' | ';' => {
                    self.advance();
                    tokens.push(Token::End);
                }
                '#' => while self.text.next_if(|c| *c != '\n').is_some() {},
                c if c.is_whitespace() => drop(self.advance()),
                _ => {
                    let line = self.line;
                    let word = self.word()?;
                    if !word.is_empty() {
                        tokens.push(Token::Word(word, line));
                    }
                }
            }
        }
        Ok(tokens)
    }

    fn advance(&mut self) -> Option<char> {
        let next = self.text.next()?;
        self.line += usize::from(next == '\n');
        Some(next)
    }

    fn error(&self, what: &'static str) -> SyntaxError {
        SyntaxError { line: self.line, what }
    }

    /// A word, empty when it is but a line that goes on.
    fn word(&mut self) -> Result<Word, SyntaxError> {
        let mut word = Word::new();
        while let Some(next) = self.text.peek().copied() {
            match next {
                c if c.is_whitespace() || c == ';' => break,
                '\\' => {
                    self.advance();
                    // A backslash at its end lets a line go on.
                    match self.advance() {
                        Some('\n') | None => {}
                        Some(c) => push(&mut word, c),
                    }
                }
                '\'' => {
                    self.advance();
                    word.push(Piece::Text(String::new()));
                    loop {
                        match self.advance() {
                            Some('\'') => break,
                            Some(c) => push(&mut word, c),
                            None => return Err(self.error("a quote is not closed")),
                        }
                    }
                }
                '"' => {
                    self.advance();
                    self.double_quoted(&mut word)?;
                }
                '$' => self.variable(&mut word, false)?,
                c => {
                    self.advance();
                    push(&mut word, c);
                }
            }
        }
        Ok(word)
    }

    fn double_quoted(&mut self, word: &mut Word) -> Result<(), SyntaxError> {
        word.push(Piece::Text(String::new()));
        loop {
            match self.text.peek().copied() {
                Some('"') => {
                    self.advance();
                    return Ok(());
                }
                Some('$') => self.variable(word, true)?,
                Some('\\') => {
                    self.advance();
                    match self.advance() {
                        Some('\n') => {}
                        Some(c @ ('"' | '\\' | '$')) => push(word, c),
                        Some(c) => {
                            push(word, '\\');
                            push(word, c);
                        }
                        None => return Err(self.error("a quote is not closed")),
                    }
                }
                Some(c) => {
                    self.advance();
                    push(word, c);
                }
                None => return Err(self.error("a quote is not closed")),
            }
        }
    }

    fn variable(&mut self, word: &mut Word, quoted: bool) -> Result<(), SyntaxError> {
        self.advance();
        let mut name = String::new();
        if self.text.next_if_eq(&'{').is_some() {
            loop {
                match self.advance() {
                    Some('}') => break,
                    Some(c) if c != '\n' => name.push(c),
                    _ => return Err(self.error("a variable's name has no end")),
                }
            }
        } else if let Some(c) = self.text.next_if(|c| *c == '?' || *c == '@' || *c == '*') {
            name.push(c);
        } else {
            while let Some(c) = self.text.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
                name.push(c);
            }
        }
        if name.is_empty() {
            push(word, '$');
        } else {
            word.push(Piece::Variable { name, quoted });
        }
        Ok(())
    }
}

fn push(word: &mut Word, c: char) {
    match word.last_mut() {
        Some(Piece::Text(text)) => text.push(c),
        _ => word.push(Piece::Text(c.into())),
    }
}

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<Token>>,
    line: usize,
}

impl Parser {
    fn error(&self, what: &'static str) -> SyntaxError {
        SyntaxError { line: self.line, what }
    }

    /// Statements up to one that begins with one of these words, which stays.
    fn block(&mut self, ends: &[&str], depth: u32) -> Result<Vec<Node>, SyntaxError> {
        if depth > DEPTH_MAX {
            return Err(self.error("blocks are nested too deep"));
        }
        let mut nodes = Vec::new();
        loop {
            while matches!(self.tokens.peek(), Some(Token::End)) {
                self.tokens.next();
            }
            let Some(Token::Word(first, line)) = self.tokens.peek() else {
                return if ends.is_empty() {
                    Ok(nodes)
                } else {
                    Err(self.error("a block has no end"))
                };
            };
            self.line = *line;
            let word = plain(first).unwrap_or_default().to_owned();
            if ends.contains(&word.as_str()) {
                return Ok(nodes);
            }
            match word.as_str() {
                "if" => nodes.push(self.conditional(depth)?),
                "menuentry" | "submenu" => {
                    self.tokens.next();
                    let arguments = self.words_to("{")?;
                    let body = self.block(&["}"], depth + 1)?;
                    self.tokens.next();
                    nodes.push(Node::Menu { submenu: word == "submenu", arguments, body });
                }
                "function" => {
                    self.words_to("{")?;
                    self.block(&["}"], depth + 1)?;
                    self.tokens.next();
                }
                "for" | "while" | "until" => {
                    self.tokens.next();
                    self.block(&["do"], depth + 1)?;
                    self.tokens.next();
                    self.block(&["done"], depth + 1)?;
                    self.tokens.next();
                }
                "{" => {
                    self.tokens.next();
                    nodes.extend(self.block(&["}"], depth + 1)?);
                    self.tokens.next();
                }
                "then" | "elif" | "else" | "fi" | "do" | "done" | "}" => {
                    return Err(self.error("a block ends that has not begun"));
                }
                _ => nodes.push(Node::Command(self.words())),
            }
        }
    }

    fn conditional(&mut self, depth: u32) -> Result<Node, SyntaxError> {
        let mut branches = Vec::new();
        loop {
            // `if` or `elif`.
            self.tokens.next();
            let condition = self.block(&["then"], depth + 1)?;
            self.tokens.next();
            let body = self.block(&["elif", "else", "fi"], depth + 1)?;
            branches.push((condition, body));
            match self.tokens.peek() {
                Some(Token::Word(word, _)) if plain(word) == Some("elif") => {}
                Some(Token::Word(word, _)) if plain(word) == Some("else") => {
                    self.tokens.next();
                    let otherwise = self.block(&["fi"], depth + 1)?;
                    self.tokens.next();
                    return Ok(Node::If(branches, otherwise));
                }
                _ => {
                    self.tokens.next();
                    return Ok(Node::If(branches, Vec::new()));
                }
            }
        }
    }

    /// The words of a command.
    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some(Token::Word(word, _)) =
            self.tokens.next_if(|token| matches!(token, Token::Word(..)))
        {
            words.push(word);
        }
        words
    }

    fn words_to(&mut self, end: &str) -> Result<Vec<Word>, SyntaxError> {
        let mut words = Vec::new();
        loop {
            match self.tokens.next() {
                Some(Token::Word(word, _)) if plain(&word) == Some(end) => return Ok(words),
                Some(Token::Word(word, _)) => words.push(word),
                // `function name` may have its brace on the next line.
                Some(Token::End) if !words.is_empty() => {}
                _ => return Err(self.error("a block has no beginning")),
            }
        }
    }
}

/// The text of a word that is but text.
fn plain(word: &Word) -> Option<&str> {
    match word.as_slice() {
        [Piece::Text(text)] => Some(text),
        _ => None,
    }
}
