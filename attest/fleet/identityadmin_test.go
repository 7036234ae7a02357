package fleet

import (
	"context"
	"encoding/json"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
)

// TestIdentityAdmin drives permits, purchase list and tickets as attestctl
// does, over the socket.
func TestIdentityAdmin(t *testing.T) {
	b := newBench(t)
	k := b.approvers()
	d := b.device()
	id := deviceID(t, d)
	path := filepath.Join(t.TempDir(), "a")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ServeAdmin(ctx, path, b.service, slog.New(slog.DiscardHandler)) }()
	defer func() { cancel(); <-done }()
	admin := NewAdmin(path)
	awaitAdmin(t, admin)

	ticket, err := admin.CreateTicket(ctx, 3, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.enrol(d, ticket.Ticket, nil); err != nil {
		t.Fatal(err)
	}
	d.Renew()
	present := func(signers int) error {
		data, err := json.Marshal(b.permit(PermitRequest{Device: id, Reason: "key renewed"}, k[:signers]...))
		if err != nil {
			t.Fatal(err)
		}
		_, err = admin.AddPermit(ctx, data)
		return err
	}
	if err := present(1); err == nil || !strings.Contains(err.Error(), "not approved") {
		t.Errorf("one signature: %v", err)
	}
	if err := present(2); err != nil {
		t.Fatal(err)
	}
	if _, err := b.enrol(d, ticket.Ticket, nil); err != nil {
		t.Fatal(err)
	}
	former, err := admin.Former(ctx, id.String())
	if err != nil || len(former) != 1 || former[0].ID != id {
		t.Errorf("former: %+v, %v", former, err)
	}
	permits, err := admin.Permits(ctx)
	if err != nil || len(permits) != 1 || permits[0].Used.IsZero() || len(permits[0].Signers) != 2 {
		t.Errorf("permits: %+v, %v", permits, err)
	}
	if n, err := admin.AddPurchase(ctx, PurchaseRequest{Source: "x", Keys: []attest.Digest{{1}, {2}}}); err != nil || n.Added != 2 {
		t.Errorf("purchase: %v, %v", n, err)
	}
	if list, err := admin.Purchase(ctx); err != nil || len(list) != 2 {
		t.Errorf("purchase: %v, %v", list, err)
	}
	if err := admin.RevokeTicket(ctx, ticket.ID); err != nil {
		t.Error(err)
	}
	if list, err := admin.Tickets(ctx); err != nil || len(list) != 0 {
		t.Errorf("tickets: %v, %v", list, err)
	}
	if err := admin.RevokeTicket(ctx, ticket.ID); err == nil {
		t.Error("revoked twice")
	}
}

func awaitAdmin(t *testing.T, a *Admin) {
	t.Helper()
	tick, limit := time.NewTicker(5*time.Millisecond), time.After(5*time.Second)
	defer tick.Stop()
	for {
		if _, err := a.Devices(t.Context()); err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("the admin socket does not answer")
		}
	}
}

func TestParsePurchase(t *testing.T) {
	one := attest.Digest{1}
	list, err := ParsePurchase([]byte("# delivery\n\n" + strings.ToUpper(one.String()) + ";laptop 1\r\n" + attest.Digest{2}.String() + "\n"))
	if err != nil || len(list) != 2 || list[0] != one {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := ParsePurchase([]byte("abc\n")); err == nil {
		t.Error("a short digest was read")
	}
}

func FuzzParsePurchase(f *testing.F) {
	f.Add([]byte(attest.Digest{}.String() + "\n# x\n"))
	f.Fuzz(func(t *testing.T, data []byte) { ParsePurchase(data) })
}
