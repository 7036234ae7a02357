package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/fleet"
	"sekisho/attest/gate"
)

// cardCommands are those about the laptops' smart cards.
func cardCommands() map[string]command {
	return map[string]command{
		"card check":   {1, checkCard, show(printCard)},
		"card permit":  {0, newCardPermit, show(printDocument[*approval.Signed])},
		"card add":     {1, addCardPermit, show(printCardPermit)},
		"card show":    {1, showCard, show(printCardState)},
		"card request": {1, fetchRequest, show(printDocument[*gate.CardRequest])},
		"card logons":  {1, cardLogons, show(printLogons)},
	}
}

// newCardPermit makes a permit to be signed. A PIN is read from standard input:
// command lines are seen by others.
func newCardPermit(_ context.Context, o *options, _ []string) (any, error) {
	p := attest.CardPermit{
		Serial: rand.Text(), User: o.card.user, Name: o.card.name, Do: attest.CardAction(o.card.do),
		Minutes: o.card.minutes, Reason: o.reason, Expires: o.until(8 * time.Hour),
	}
	if err := p.Device.UnmarshalText([]byte(o.device)); err != nil {
		return nil, fmt.Errorf("-device: %w", err)
	}
	switch p.Do {
	case attest.CardEnrol, attest.CardDelete:
		p.Finger = o.card.finger
	case attest.CardImport:
		data, err := readFile(o.card.chain)
		if err != nil {
			return nil, fmt.Errorf("-chain: %w", err)
		}
		p.Chain = string(data)
	case attest.CardPIN:
		text, err := io.ReadAll(io.LimitReader(os.Stdin, 64))
		if err != nil {
			return nil, err
		}
		padded, err := attest.PadCardPIN(strings.TrimSpace(string(text)))
		if err != nil {
			return nil, fmt.Errorf("standard input: %w", err)
		}
		hash, err := attest.NewCardPINHash(padded)
		if err != nil {
			return nil, err
		}
		p.PIN = &hash
	}
	if err := p.Validate(); err != nil {
		return nil, err
	}
	return approval.New(attest.ApproveCard, p)
}

func addCardPermit(ctx context.Context, o *options, args []string) (any, error) {
	data, err := readFile(args[0])
	if err != nil {
		return nil, err
	}
	return o.admin().AddCardPermit(ctx, data)
}

func printCardPermit(w printer, p fleet.CardPermit) error {
	return w.say("%.16s  %s %s、%s まで", "%.16s  %s %s until %s", p.ID, p.Permit.Do, p.Permit.User, w.when(p.Permit.Expires))
}

func showCard(ctx context.Context, o *options, args []string) (any, error) {
	return o.admin().Card(ctx, args[0])
}

func printCardState(w printer, c fleet.Card) error {
	t, flush := w.table("", "")
	t.say("証明書要求\t%v\n許可\t操作\t利用者\t有効期限\t署名者数\t理由", "certificate request\t%v\nPERMIT\tDO\tUSER\tEXPIRES\tSIGNERS\tREASON", len(c.Request) > 0)
	for _, p := range c.Permits {
		t.row(fmt.Sprintf("%.16s", p.ID), p.Permit.Do, p.Permit.User, t.when(p.Permit.Expires), len(p.Signers), p.Permit.Reason)
	}
	return flush()
}

// fetchRequest fetches what card check judges.
func fetchRequest(ctx context.Context, o *options, args []string) (any, error) {
	c, err := o.admin().Card(ctx, args[0])
	if err != nil {
		return nil, err
	}
	if len(c.Request) == 0 {
		return nil, errors.New("the laptop has reported no certificate request; set the card up first: attestctl card permit -do setup")
	}
	return gate.ParseCardRequest(c.Request)
}

func cardLogons(ctx context.Context, o *options, args []string) (any, error) {
	return o.admin().Logons(ctx, args[0])
}

func printLogons(w printer, list []attest.LogonEvent) error {
	t, flush := w.table("番号\t時刻\t利用者\t内容\t認証\t理由\t根拠", "NUMBER\tTIME\tUSER\tWHAT\tFACTOR\tREASON\tUNDER")
	for _, e := range list {
		under := e.Result
		if e.Permit != "" {
			under = attest.Say("許可 %s", "permit %s", e.Permit).In(t.language)
		}
		t.row(e.Number, t.when(e.Time), e.User, e.What, e.Factor, e.Reason, under)
	}
	return flush()
}
