//! The actor that changes things and keeps them on disk, and the handle callers hold.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use actix::prelude::*;
use arc_swap::ArcSwap;
use serde_json::Value;
use tracing::{error, info, warn};

use super::book::Book;
use super::edit::{Bench, ensure_default, reseal};
use super::folder::Folder;
use super::view::{AccountView, DEFAULT, FixedView, Gateway, View};
use crate::base::{AccountId, Error, Lookup, Millis, Result};
use crate::config::gateway::Fixed;
use crate::vault::seal::Sealer;

/// Changes waiting at most; callers wait in line behind it.
const MAILBOX: usize = 1024;

/// The registry's whole outside. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    addr: Addr<RegistryActor>,
    view: Arc<ArcSwap<View>>,
}

/// Changes a book, or refuses to; a book that was refused is thrown away.
type Edit = Box<dyn FnOnce(&mut Book, &Bench) -> Result<Value> + Send>;

impl Registry {
    /// Reads what is on disk, seals anew what an earlier master key sealed, and starts the actor on a thread of its own. Without a
    /// folder, or where another process has it, what is there is served and nothing can be changed.
    ///
    /// # Errors
    /// When what the file says cannot be compiled, or the folder cannot be read.
    pub fn start(folder: Option<&Path>, fixed: Fixed, sealer: Sealer) -> Result<Self> {
        let folder = folder.map(|path| {
            Folder::open(path).unwrap_or_else(|error| {
                warn!(%error, "the registry can be read and not changed");
                Folder::peek(path, error.message())
            })
        });
        let found = folder.as_ref().map(Folder::read).transpose()?.unwrap_or_default();
        for (account, reason) in &found.broken {
            error!(account, reason, "an account's registry cannot be read; it is left alone and cannot be changed");
        }
        let mut accounts = Lookup::default();
        for (account, mut book) in found.books {
            if let Some(folder) = &folder {
                renew(folder, &account, &mut book, &sealer);
            }
            accounts.insert(account.clone(), Arc::new(AccountView::new(&account, book, None, &sealer)));
        }
        info!(accounts = accounts.len(), gateways = fixed.gateways.len(), "registry read");
        let fixed = Arc::new(FixedView::new(fixed, Millis::now())?);
        let view = Arc::new(ArcSwap::from_pointee(View { fixed, accounts }));
        let shared = view.clone();
        let addr = RegistryActor::start_in_arbiter(&Arbiter::new().handle(), move |ctx| {
            ctx.set_mailbox_capacity(MAILBOX);
            RegistryActor { folder, broken: found.broken, sealer, view: shared }
        });
        Ok(Self { addr, view })
    }

    /// What is in force now.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Puts what the file says now in force, for calls from now on.
    ///
    /// # Errors
    /// When it cannot be compiled; what was in force stays.
    pub fn replace_fixed(&self, fixed: Fixed) -> Result<()> {
        let current = self.view();
        if current.fixed.written == fixed {
            return Ok(());
        }
        let fixed = Arc::new(FixedView::new(fixed, Millis::now())?);
        // Beside the actor, which may put an account in force at the same moment: neither undoes what the other does.
        self.view.rcu(|view| View { fixed: fixed.clone(), accounts: view.accounts.clone() });
        Ok(())
    }

    /// The gateway `default` of an account, which comes into being here: for the first authenticated request.
    ///
    /// # Errors
    /// When the actor has died.
    pub async fn ensure_default(&self, account: &AccountId) -> Result<Arc<Gateway>> {
        if let Some(gateway) = self.view().gateway(account.as_str(), DEFAULT) {
            return Ok(gateway);
        }
        let edit = |book: &mut Book, bench: &Bench| {
            ensure_default(book, bench);
            Ok(Value::Null)
        };
        self.send(account, Box::new(edit), false).await?;
        let made = self.view().gateway(account.as_str(), DEFAULT);
        made.ok_or_else(|| Error::internal("the gateway \"default\" cannot be used"))
    }

    /// Changes an account's book; the change is on disk when this returns.
    pub(super) async fn change(
        &self,
        account: &AccountId,
        edit: impl FnOnce(&mut Book, &Bench) -> Result<Value> + Send + 'static,
    ) -> Result<Value> {
        self.send(account, Box::new(edit), true).await
    }

    async fn send(&self, account: &AccountId, edit: Edit, durable: bool) -> Result<Value> {
        let change = Change { account: account.clone(), edit, durable };
        self.addr
            .send(change)
            .await
            .map_err(|error| Error::internal("The keeper of the registry is not answering.").with_source(error))?
    }
}

/// Seals anew what another key than the current one sealed. What cannot be, stays as it is.
fn renew(folder: &Folder, account: &str, book: &mut Book, sealer: &Sealer) {
    let before = book.clone();
    let outcome = reseal(account, book, sealer);
    match outcome {
        Ok(0) => {}
        Ok(count) => match folder.write(account, book) {
            Ok(()) => info!(account, secrets = count, "sealed anew under the current master key"),
            Err(error) => {
                warn!(account, %error, "not sealed anew");
                *book = before;
            }
        },
        Err(error) => {
            warn!(account, %error, "not sealed anew");
            *book = before;
        }
    }
}

struct RegistryActor {
    /// `None`: there is no place.
    folder: Option<Folder>,
    broken: BTreeMap<String, String>,
    sealer: Sealer,
    view: Arc<ArcSwap<View>>,
}

impl Actor for RegistryActor {
    type Context = Context<Self>;
}

#[derive(Message)]
#[rtype(result = "Result<Value>")]
struct Change {
    account: AccountId,
    edit: Edit,
    /// Whether it counts only when it is on disk.
    durable: bool,
}

impl Handler<Change> for RegistryActor {
    type Result = Result<Value>;

    fn handle(&mut self, Change { account, edit, durable }: Change, _: &mut Context<Self>) -> Result<Value> {
        let name = account.as_str();
        let current = self.view.load_full();
        let before = current.accounts.get(name).map(Arc::as_ref);
        let mut book = before.map(|account| account.book.clone()).unwrap_or_default();
        let value = edit(&mut book, &Bench { account: name, sealer: &self.sealer, now: Millis::now() })?;
        if before.is_some_and(|account| account.book == book) {
            return Ok(value);
        }
        match self.keep(name, &book) {
            Ok(()) => {}
            Err(error) if durable => return Err(error),
            Err(error) => warn!(account = name, %error, "kept in memory only"),
        }
        let compiled = Arc::new(AccountView::new(name, book, before, &self.sealer));
        self.view.rcu(|view| {
            let mut accounts = view.accounts.clone();
            accounts.insert(name.to_owned(), compiled.clone());
            View { fixed: view.fixed.clone(), accounts }
        });
        Ok(value)
    }
}

impl RegistryActor {
    fn keep(&self, account: &str, book: &Book) -> Result<()> {
        let Some(folder) = &self.folder else {
            return Err(Error::unsupported(
                "Nothing can be changed here: this server has no place for it. Its operator has to set registry.folder.",
            ));
        };
        if let Some(reason) = self.broken.get(account) {
            error!(account, reason, "a change was refused");
            return Err(Error::internal(
                "what this account has told before cannot be read; the server's log says more",
            ));
        }
        folder.write(account, book)
    }
}
