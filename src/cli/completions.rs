//! `neurond completions`: a script that teaches the shell our commands and flags.

use clap_complete::Shell;

use crate::base::Result;

const EXAMPLES: &str = "\
Examples:
  neurond completions bash > ~/.local/share/bash-completion/completions/neurond
  neurond completions zsh > ~/.zfunc/_neurond        with fpath+=~/.zfunc before compinit in ~/.zshrc
  neurond completions fish > ~/.config/fish/completions/neurond.fish";

/// Arguments of `neurond completions`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Which shell
    shell: Shell,
}

/// Prints the script for `command`.
pub fn run(args: Args, command: &mut clap::Command) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "neurond", &mut script);
    super::print(&String::from_utf8_lossy(&script))
}
