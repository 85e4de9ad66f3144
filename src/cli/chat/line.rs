//! The prompt: line editing, history across sessions, and orders completed with Tab.

use std::path::PathBuf;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::Validator;
use rustyline::{CompletionType, Config, Context, Editor, Helper};

use super::conversation::ORDERS;
use crate::base::Result;

/// What a person did at the prompt.
pub enum Typed {
    /// A whole message or order.
    Line(String),
    /// Ctrl-C: what was typed is dropped.
    Nothing,
    /// Ctrl-D.
    End,
}

/// A terminal to read from.
pub struct Prompt {
    editor: Editor<Completion, FileHistory>,
    history: Option<PathBuf>,
}

impl Prompt {
    /// Opens the terminal. A history that cannot be read or kept is no reason not to talk.
    pub fn open() -> Result<Self> {
        let config = Config::builder().auto_add_history(false).completion_type(CompletionType::List).build();
        let mut editor = Editor::with_config(config)
            .map_err(|error| crate::cli::failed(format!("cannot read from this terminal: {error}")))?;
        editor.set_helper(Some(Completion { models: Vec::new() }));
        let history = history_file();
        if let Some(file) = &history {
            let _ = std::fs::create_dir_all(file.parent().unwrap_or(file));
            let _ = editor.load_history(file);
        }
        Ok(Self { editor, history })
    }

    /// Ids that Tab completes after `/model`.
    pub fn know_models(&mut self, models: Vec<String>) {
        if let Some(helper) = self.editor.helper_mut() {
            helper.models = models;
        }
    }

    /// Reads one message. A line that ends in a backslash goes on in the next one.
    pub fn read(&mut self) -> Result<Typed> {
        let typed = self.lines("> ", |line| !line.ends_with('\\'))?;
        let Typed::Line(text) = typed else { return Ok(typed) };
        let text = text.lines().map(|line| line.strip_suffix('\\').unwrap_or(line)).collect::<Vec<_>>().join("\n");
        self.remember(&text);
        Ok(Typed::Line(text))
    }

    /// Reads lines up to one that holds only a dot.
    pub fn read_many(&mut self) -> Result<Typed> {
        let typed = self.lines("… ", |line| line.trim_end() == ".")?;
        let Typed::Line(text) = typed else { return Ok(typed) };
        let text = text.trim_end().trim_end_matches('.').trim_end().to_owned();
        self.remember(&text);
        Ok(Typed::Line(text))
    }

    fn lines(&mut self, first_prompt: &str, is_last: impl Fn(&str) -> bool) -> Result<Typed> {
        let mut text = String::new();
        loop {
            match self.editor.readline(if text.is_empty() { first_prompt } else { "… " }) {
                Ok(line) => {
                    text.push_str(&line);
                    if is_last(&line) {
                        return Ok(Typed::Line(text));
                    }
                    text.push('\n');
                }
                Err(ReadlineError::Interrupted) => return Ok(Typed::Nothing),
                Err(ReadlineError::Eof) => return Ok(Typed::End),
                Err(error) => return Err(crate::cli::failed(format!("cannot read from this terminal: {error}"))),
            }
        }
    }

    // Written at once: a terminal that is closed takes the program with it.
    fn remember(&mut self, text: &str) {
        if text.trim().is_empty() {
            return;
        }
        let _ = self.editor.add_history_entry(text);
        if let Some(file) = &self.history {
            let _ = self.editor.append_history(file);
        }
    }
}

/// `$XDG_STATE_HOME/neurond/chat_history`, by default under `~/.local/state`.
fn history_file() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let state = state.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state")))?;
    Some(state.join("neurond/chat_history"))
}

struct Completion {
    models: Vec<String>,
}

impl Completer for Completion {
    type Candidate = String;

    fn complete(&self, line: &str, at: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..at];
        if let Some(begun) = typed.strip_prefix("/model ") {
            let fitting = self.models.iter().filter(|model| model.starts_with(begun)).cloned().collect();
            return Ok((at - begun.len(), fitting));
        }
        if !typed.starts_with('/') {
            return Ok((at, Vec::new()));
        }
        let fitting = ORDERS.iter().filter(|(name, ..)| name.starts_with(typed));
        Ok((
            0,
            fitting.map(|(name, args, _)| if args.is_empty() { (*name).into() } else { format!("{name} ") }).collect(),
        ))
    }
}

impl Hinter for Completion {
    type Hint = String;
}
impl Highlighter for Completion {}
impl Validator for Completion {}
impl Helper for Completion {}
