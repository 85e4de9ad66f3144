//! `neurond keys`: tokens for callers, the master key, and the providers' keys that are stored under it.
//!
//!     token ──hash──> [[auth.token]]           who may call
//!     master key ──seals──> stored keys        with what a call goes on to a provider
//!
//! What changes stored keys takes the registry's folder; while a daemon has it, the management API is the way.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::table::{Side, render};
use super::{failed, print};
use crate::base::{Error, Result, Secret};
use crate::config::{self, Config, Overrides};
use crate::registry::{KeyLine, KeyName, Offline};
use crate::vault::seal::{MasterKey, Sealer, random_token, rotating};

const EXAMPLES: &str = "\
Examples:
  neurond keys hash                                  a fresh token, its hash, and what to paste into the configuration
  printf %s \"$TOKEN\" | neurond keys hash             the same for a token you have
  neurond keys init                                  a master key where the configuration wants it
  pass openai | neurond keys set --account acme --provider openai --default
  neurond keys list
  neurond keys rotate                                everything under a new master key

Stored keys are sealed (AES-256-GCM) under the master key in vault.master_key_file, in registry.folder. Whoever has both has
the keys: keep a copy of the master key, and keep it elsewhere. While the daemon runs, keys are stored with its API:
  curl -H \"Authorization: Bearer $TOKEN\" $URL/client/v4/accounts/$ACCOUNT/ai-gateway/gateways/default/provider_configs \\
    -d '{\"alias\": \"default\", \"provider_slug\": \"openai\", \"default_config\": true, \"secret\": \"sk-…\"}'";

/// Arguments of `neurond keys`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    /// Configuration file [default: ./neurond.toml, then /etc/neurond/neurond.toml]
    #[arg(long, short, value_name = "FILE", env = "NEUROND_CONFIG", global = true)]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Hash a token read from standard input, or make one, and show what to write for it
    Hash(Hash),
    /// Make a master key
    Init {
        /// Where [default: what the configuration says]
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Seal every stored key anew under a new master key. The daemon must not run
    Rotate {
        /// The new master key's file, made if it is not there; the configuration has to name it afterwards
        /// [default: the file that the configuration names, replaced when all is done]
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
    },
    /// List stored keys: never the key itself
    List {
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Store a provider's key, read from standard input. The daemon must not run
    Set {
        #[command(flatten)]
        name: Name,
        /// Meant when a call names no alias
        #[arg(long)]
        default: bool,
    },
    /// Remove a stored key. The daemon must not run
    Remove {
        #[command(flatten)]
        name: Name,
    },
}

#[derive(clap::Args)]
struct Hash {
    /// Make a token, whatever standard input is
    #[arg(long)]
    new: bool,
    /// Its name, for the block to paste
    #[arg(long, default_value = "NAME")]
    id: String,
    /// Who pays, for the block to paste
    #[arg(long, default_value = "ACCOUNT")]
    account: String,
    /// For programs
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Name {
    /// Whose key
    #[arg(long)]
    account: String,
    /// Gateway that it is used under
    #[arg(long, default_value = "default")]
    gateway: String,
    /// Provider that it is for, such as openai or custom-mine
    #[arg(long)]
    provider: String,
    /// Its name, as cf-aig-byok-alias says it
    #[arg(long, default_value = "default")]
    alias: String,
}

impl From<Name> for KeyName {
    fn from(name: Name) -> Self {
        let Name { account, gateway, provider, alias } = name;
        Self { account, gateway, provider, alias }
    }
}

/// Does one of them.
pub fn run(args: Args) -> Result<ExitCode> {
    let config = || config::load(args.config.as_deref(), &Overrides::default());
    match args.command {
        Command::Hash(hash) => hash_token(&hash),
        Command::Init { file: Some(file) } => init(&file),
        Command::Init { file: None } => init(&master_key(&config()?)?),
        Command::Rotate { to } => rotate(&config()?, to.as_deref()),
        Command::List { json } => list(&config()?, json),
        Command::Set { name, default } => set(&config()?, &name.into(), default, &read_secret("key")?),
        Command::Remove { name } => remove(&config()?, &name.into()),
    }
    .map(|()| ExitCode::SUCCESS)
}

fn hash_token(args: &Hash) -> Result<()> {
    let made = args.new || std::io::stdin().is_terminal();
    let token = if made { random_token() } else { read_secret("token")? };
    if token.expose().len() < 16 {
        eprintln!(
            "the token is {} characters long: it can be guessed; neurond keys hash --new makes one",
            token.expose().len()
        );
    }
    print(&hashed(&token, made, args))
}

fn hashed(token: &Secret<String>, made: bool, args: &Hash) -> String {
    let sha256 = Sha256::digest(token.expose().as_bytes());
    let sha256: String = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    let shown = made.then(|| token.expose());
    if args.json {
        return format!("{}\n", json!({ "token": shown, "sha256": sha256 }));
    }
    let mut text = String::new();
    if let Some(token) = shown {
        text = format!("token   {token}\n        for the caller; it is nowhere else, and not shown again\n");
    }
    let Hash { id, account, .. } = args;
    text + &format!("sha256  {sha256}\n\n[[auth.token]]\nid = {id:?}\nsha256 = \"{sha256}\"\naccount = {account:?}\n")
}

fn init(path: &Path) -> Result<()> {
    let key = MasterKey::random();
    key.write_new(path)?;
    eprintln!("keep a copy of it elsewhere: without it nothing that is stored can be opened");
    print(&format!("{}  key {}\n", path.display(), key.id()))
}

/// Nothing is lost at any instant: until all is sealed anew both keys are on disk, and whoever opens the old key's file reads the new one
/// beside it as well. Begun again, it goes on.
fn rotate(config: &Config, to: Option<&Path>) -> Result<()> {
    let path = master_key(config)?;
    let mut registry = take(config)?;
    let mut earlier = vec![MasterKey::read(&path)?];
    for file in &config.key_files.previous {
        earlier.push(MasterKey::read(file)?);
    }
    let fresh = to.map_or_else(|| rotating(&path), Path::to_path_buf);
    if fresh == path {
        return Err(Error::bad_input(format!(
            "--to {}: is the master key that is to go; name another file",
            path.display()
        )));
    }
    let key = if fresh.exists() {
        eprintln!("{} is there: going on with it", fresh.display());
        MasterKey::read(&fresh)?
    } else {
        let key = MasterKey::random();
        key.write_new(&fresh)?;
        key
    };
    let old = earlier[0].id().to_owned();
    let count = registry.reseal(&Sealer::new(key.clone(), earlier))?;
    if to.is_none() {
        let renamed = std::fs::rename(&fresh, &path).and_then(|()| {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            std::fs::File::open(folder)?.sync_all()
        });
        renamed.map_err(|error| {
            failed(format!("{} cannot be replaced: {error}; rename {} to it", path.display(), fresh.display()))
        })?;
    } else {
        eprintln!("now set vault.master_key_file = {:?} in the configuration", fresh.display().to_string());
    }
    print(&format!("sealed anew: {count}, key {old} -> {}\n", key.id()))
}

fn list(config: &Config, as_json: bool) -> Result<()> {
    let (lines, broken) = Offline::list(folder(config)?)?;
    for reason in broken {
        eprintln!("{reason}");
    }
    if as_json {
        let lines: Vec<_> = lines.iter().map(as_object).collect();
        return print(&format!("{:#}\n", json!(lines)));
    }
    if lines.is_empty() {
        eprintln!("no keys are stored");
        return Ok(());
    }
    let columns =
        ["account", "gateway", "provider", "alias", "default", "key", "stored"].map(|name| (name, Side::Left));
    let rows: Vec<_> = lines.iter().map(row).collect();
    print(&render(&columns, &rows))
}

fn row(line: &KeyLine) -> Vec<String> {
    let KeyName { account, gateway, provider, alias } = line.name.clone();
    let default = if line.default { "yes" } else { "no" };
    vec![account, gateway, provider, alias, default.into(), line.preview.clone(), day(line)]
}

fn as_object(line: &KeyLine) -> serde_json::Value {
    let KeyName { account, gateway, provider, alias } = &line.name;
    json!({
        "account": account,
        "gateway": gateway,
        "provider": provider,
        "alias": alias,
        "default": line.default,
        "preview": line.preview,
        "modified_at": line.modified.0,
    })
}

fn day(line: &KeyLine) -> String {
    let at = i64::try_from(line.modified.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    at.map(|at| at.strftime("%Y-%m-%d").to_string()).unwrap_or_default()
}

fn set(config: &Config, name: &KeyName, default: bool, secret: &Secret<String>) -> Result<()> {
    let mut registry = take(config)?;
    let written = config.fixed.gateways.iter().any(|gateway| {
        let whose = gateway.account.as_ref().is_none_or(|account| account.as_str() == name.account);
        whose && gateway.id == name.gateway
    });
    if !written && !registry.has_gateway(&name.account, &name.gateway) {
        let message = format!(
            "account {} has no gateway {:?}: make it with the API, or write a [[gateway]] block",
            name.account, name.gateway
        );
        return Err(failed(message));
    }
    let keys = &config.key_files;
    let sealer = Sealer::open_files(keys.named.as_deref(), keys.default.as_deref(), &keys.previous)?;
    let replaced = registry.set(name, default, secret, &sealer)?;
    eprintln!("{}", if replaced { "stored in place of the one that was there" } else { "stored" });
    Ok(())
}

fn remove(config: &Config, name: &KeyName) -> Result<()> {
    take(config)?.remove(name)?;
    eprintln!("removed");
    Ok(())
}

fn take(config: &Config) -> Result<Offline> {
    Offline::open(folder(config)?).map_err(|error| {
        Error::bad_input(format!(
            "{error}. While the daemon runs, use its API (…/ai-gateway/gateways/GATEWAY/provider_configs); neurond keys --help \
             shows how"
        ))
    })
}

fn folder(config: &Config) -> Result<&Path> {
    config.registry.as_deref().ok_or_else(|| {
        Error::bad_input("there is no folder for stored keys: set registry.folder, or STATE_DIRECTORY, or HOME")
    })
}

fn master_key(config: &Config) -> Result<PathBuf> {
    let path = config.key_files.named.as_ref().or(config.key_files.default.as_ref());
    path.cloned().ok_or_else(|| {
        Error::bad_input("there is no place for a master key: set vault.master_key_file, or STATE_DIRECTORY, or HOME")
    })
}

/// One line of standard input. A terminal would show it, and shells remember what is typed.
fn read_secret(what: &str) -> Result<Secret<String>> {
    let mut stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Err(Error::bad_input(format!("pipe the {what} in: neurond keys … < file, or from a password manager")));
    }
    let mut text = String::new();
    stdin.read_to_string(&mut text).map_err(|error| failed(format!("cannot read standard input: {error}")))?;
    let text = match serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&text) {
        Ok(object) => serde_json::Value::Object(object).to_string(),
        Err(_) => text.trim().to_owned(),
    };
    if text.is_empty() {
        return Err(Error::bad_input(format!("standard input is empty: pipe the {what} in")));
    }
    Ok(Secret::new(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::gateway::KeyFiles;

    /// A configuration whose state is in a folder.
    fn config(state: &Path) -> Config {
        let key_files = KeyFiles { named: None, default: Some(state.join("master.key")), previous: vec![] };
        Config { registry: Some(state.join("registry")), key_files, ..Config::default() }
    }

    fn name(gateway: &str, alias: &str) -> KeyName {
        KeyName { account: "acme".into(), gateway: gateway.into(), provider: "openai".into(), alias: alias.into() }
    }

    fn rows(config: &Config) -> Vec<String> {
        let (lines, broken) = Offline::list(config.registry.as_deref().unwrap()).unwrap();
        assert!(broken.is_empty(), "{broken:?}");
        lines.iter().map(|line| row(line)[1..6].join(" ")).collect()
    }

    fn bytes_under(folder: &Path) -> Vec<u8> {
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files.flat_map(|path| std::fs::read(path).unwrap()).collect()
    }

    #[test]
    fn keys_are_set_listed_and_removed_while_nobody_serves() {
        let state = tempfile::tempdir().unwrap();
        let config = config(state.path());
        let secret = |text: &str| Secret::new(text.to_owned());
        set(&config, &name("default", "default"), true, &secret("sk-0123456789abcdefWXYZ")).unwrap();
        set(&config, &name("default", "spare"), false, &secret("short")).unwrap();
        assert_eq!(rows(&config), ["default openai default yes ***WXYZ", "default openai spare no ***"]);
        set(&config, &name("default", "spare"), true, &secret("other")).unwrap();
        assert_eq!(rows(&config), ["default openai default no ***WXYZ", "default openai spare yes ***"]);
        let refused = set(&config, &name("prdo", "x"), false, &secret("x")).unwrap_err();
        assert!(refused.message().contains("no gateway \"prdo\""), "{refused}");
        assert!(remove(&config, &name("default", "none")).is_err());
        remove(&config, &name("default", "spare")).unwrap();
        assert_eq!(rows(&config).len(), 1);
        let held = Offline::open(config.registry.as_deref().unwrap()).unwrap();
        let refused = remove(&config, &name("default", "default")).unwrap_err();
        assert!(refused.message().contains("provider_configs"), "{refused}");
        drop(held);
        let bytes = bytes_under(config.registry.as_deref().unwrap());
        assert!(!bytes.windows(10).any(|window| window == b"0123456789"), "sealed on disk");
    }

    #[test]
    fn a_rotation_leaves_the_keys_and_only_the_new_master_key() {
        let state = tempfile::tempdir().unwrap();
        let config = config(state.path());
        set(&config, &name("default", "default"), true, &Secret::new("sk-1".into())).unwrap();
        let path = master_key(&config).unwrap();
        let old = MasterKey::read(&path).unwrap();
        let before = bytes_under(config.registry.as_deref().unwrap());
        rotate(&config, None).unwrap();
        let new = MasterKey::read(&path).unwrap();
        assert_ne!(old.id(), new.id());
        assert!(!rotating(&path).exists());
        let after = String::from_utf8(bytes_under(config.registry.as_deref().unwrap())).unwrap();
        assert!(after.contains(new.id()) && !after.contains(old.id()), "{after}");
        // Cut short after some accounts: both keys are there, and it goes on with the one that was begun with.
        let account = config.registry.as_ref().unwrap().join("acme.json");
        std::fs::write(&account, before.clone()).unwrap();
        std::fs::rename(&path, rotating(&path)).unwrap();
        old.write_new(&path).unwrap();
        rotate(&config, None).unwrap();
        assert_eq!(MasterKey::read(&path).unwrap().id(), new.id());
        assert!(std::fs::read_to_string(&account).unwrap().contains(new.id()));
        // To a file of its own the old one stays.
        let elsewhere = state.path().join("elsewhere.key");
        rotate(&config, Some(&elsewhere)).unwrap();
        assert_eq!(MasterKey::read(&path).unwrap().id(), new.id());
        let last = MasterKey::read(&elsewhere).unwrap();
        assert!(std::fs::read_to_string(&account).unwrap().contains(last.id()));
        assert!(rotate(&config, Some(&path)).is_err());
    }

    #[test]
    fn a_token_is_shown_once_and_only_if_it_was_made_here() {
        let args = |json| Hash { new: false, id: "ci".into(), account: "acme".into(), json };
        let token = Secret::new("test".to_owned());
        let hash = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        let block = format!("sha256  {hash}\n\n[[auth.token]]\nid = \"ci\"\nsha256 = \"{hash}\"\naccount = \"acme\"\n");
        assert_eq!(hashed(&token, false, &args(false)), block);
        assert!(hashed(&token, true, &args(false)).starts_with("token   test\n"));
        assert_eq!(hashed(&token, false, &args(true)), format!("{{\"token\":null,\"sha256\":\"{hash}\"}}\n"));
        let (one, other) = (random_token(), random_token());
        assert!(one.expose().len() > 40 && one != other);
    }
}
