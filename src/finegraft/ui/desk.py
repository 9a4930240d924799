"""What all addresses share: one object of each kind, made with the server.

``At`` is how a route asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from finegraft.ui.exports import Formats
from finegraft.ui.feeds import Feeds
from finegraft.ui.forecasts import Forecasts
from finegraft.ui.jobs import Jobs
from finegraft.ui.record import Records
from finegraft.ui.rows import Looks
from finegraft.ui.sessions import Sessions
from finegraft.ui.trash import Trash
from finegraft.ui.trials import Trials
from finegraft.ui.workspace import Workspace


@dataclass
class Desk:
    """The parts of one server.

    Attributes:
        port: That it listens on.
    """

    space: Workspace
    port: int
    sessions: Sessions
    jobs: Jobs
    records: Records
    feeds: Feeds
    looks: Looks
    forecasts: Forecasts
    trials: Trials
    formats: Formats
    trash: Trash

    @classmethod
    def of(cls, space: Workspace, port: int) -> Desk:
        """The parts over a workspace."""
        return cls(
            space=space,
            port=port,
            sessions=Sessions(),
            jobs=Jobs(space),
            records=Records(),
            feeds=Feeds(),
            looks=Looks(),
            forecasts=Forecasts(),
            trials=Trials(space),
            formats=Formats(),
            trash=Trash(space),
        )

    def address(self) -> str:
        """A new address that opens the page once; the token behind # is sent to nobody."""
        return f"http://127.0.0.1:{self.port}/#token={self.sessions.token()}"

    async def close(self) -> None:
        """End every stream, and the models that are being tried."""
        self.feeds.close()
        await self.trials.close()


def _desk(request: Request) -> Any:
    return request.app.state.desk


At = Annotated[Desk, Depends(_desk)]
