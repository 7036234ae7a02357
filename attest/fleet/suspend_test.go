package fleet

import (
	"crypto/sha256"
	"testing"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/verifier"
)

// TestSuspensions suspends each kind of thing and ends that: the verifier that
// was told, another one on the same store and a gateway's feed over TLS all
// follow, and nothing is concerned that should not be.
func TestSuspensions(t *testing.T) {
	b := newBench(t)
	b.full(false)
	f, start := feedOf(t, b)
	stop := start()
	defer func() { stop() }()
	r := run(t, f)
	until(t, "heard", func() bool { return r.Heard() == nil })
	d, id := b.enrolled()
	e, other := b.enrolled()
	_, key := identify(t, d)
	second := b.second("second.test")
	holder := attest.Holder{Device: id, Key: key, Issued: b.now.Add(-verifier.Backdate)}
	strange := attest.Holder{Device: other, Key: sha256.Sum256([]byte("other")), Issued: b.now.Add(-verifier.Backdate)}
	logged := func(device attest.Digest, user string) {
		t.Helper()
		if _, err := b.store.Update(t.Context(), func(x concurrency.STM) error {
			return write(x, b.service.keys.logons(device), []attest.LogonEvent{{Number: 1, User: user, Reason: "open"}, {Number: 2, User: "nobody", Reason: "closed"}})
		}); err != nil {
			t.Fatal(err)
		}
	}
	logged(id, "sato/1")
	logged(other, "suzuki")
	for _, c := range []struct {
		kind, subject string
		all           bool // concerns the other laptop too
	}{
		{"device", id.String(), false},
		{"key", key.String(), false},
		{"user", "sato/1", false},
		{"organization", "", true},
		{"organization", "", true}, // again
	} {
		if _, err := b.service.Suspend(t.Context(), SuspensionRequest{Kind: c.kind, Subject: c.subject}); err == nil {
			t.Errorf("%s: without a reason", c.kind)
		}
		if _, err := b.service.Suspend(t.Context(), SuspensionRequest{Kind: c.kind, Subject: c.subject, Resume: true}); err == nil {
			t.Errorf("%s: ended before it began", c.kind)
		}
		begin := time.Now()
		if _, err := b.service.Suspend(t.Context(), SuspensionRequest{Kind: c.kind, Subject: c.subject, Reason: "test"}); err != nil {
			t.Fatal(c.kind, err)
		}
		until(t, c.kind+" suspended at the gateway", func() bool { return r.Revoked(holder) })
		t.Logf("%s: known to the gateway after %v", c.kind, time.Since(begin).Round(time.Millisecond))
		if r.Revoked(strange) != c.all {
			t.Errorf("%s: another laptop: %v", c.kind, r.Revoked(strange))
		}
		until(t, c.kind+" known to the other verifier", func() bool { return len(second.Suspensions()) == 1 })
		if got := b.boot(d, id, image).Result; got.Reason != attest.ReasonSuspended {
			t.Errorf("%s: %v", c.kind, got.Reason)
		}
		if got := b.boot(e, other, image).Result; (got.Reason == attest.ReasonSuspended) != c.all {
			t.Errorf("%s: another laptop: %v", c.kind, got.Reason)
		}
		if _, err := b.enrol(b.device(), b.ticket(1), nil); (err != nil) != c.all {
			t.Errorf("%s: enrolment: %v", c.kind, err)
		}
		if _, err := b.service.Suspend(t.Context(), SuspensionRequest{Kind: c.kind, Subject: c.subject, Resume: true}); err != nil {
			t.Fatal(c.kind, err)
		}
		until(t, c.kind+" back at the gateway", func() bool { return !r.Revoked(holder) && !r.Revoked(strange) })
		if got := b.boot(d, id, image).Result; got.Status != attest.StatusAffirming {
			t.Errorf("%s ended: %v %s", c.kind, got.Reason, got.Detail)
		}
		if len(b.service.Suspensions()) != 0 {
			t.Errorf("%s: left over %+v", c.kind, b.service.Suspensions())
		}
	}
	for _, bad := range []SuspensionRequest{
		{Kind: "device", Subject: attest.Digest{1}.String(), Reason: "x"}, {Kind: "device", Subject: "x", Reason: "x"}, {Kind: "policy", Subject: "7", Reason: "x"},
		{Kind: "", Reason: "x"}, {Kind: "organization", Subject: "all", Reason: "x"}, {Kind: "user", Reason: "x"},
	} {
		if _, err := b.service.Suspend(t.Context(), bad); err == nil {
			t.Errorf("%+v was suspended", bad)
		}
	}
	// A user who logs on elsewhere takes the suspension along.
	if _, err := b.service.Suspend(t.Context(), SuspensionRequest{Kind: "user", Subject: "sato/1", Reason: "test"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.store.Update(t.Context(), func(x concurrency.STM) error {
		return b.service.loggedOn(x, other, []attest.LogonEvent{{Number: 3, User: "sato/1", Reason: "open"}})
	}); err != nil {
		t.Fatal(err)
	}
	until(t, "both of the user's laptops", func() bool { return r.Revoked(holder) && r.Revoked(strange) })
}

// TestCovers: what each kind of revocation ends. Unknown means closed.
func TestCovers(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	h := attest.Holder{Device: attest.Digest{1}, Key: attest.Digest{2}, Issued: now}
	for i, c := range []struct {
		r    attest.Revocation
		want bool
	}{
		{attest.Revocation{Device: attest.Digest{1}}, true},
		{attest.Revocation{Device: attest.Digest{2}}, false},
		{attest.Revocation{Kind: attest.RevokeKey, Key: attest.Digest{2}}, true},
		{attest.Revocation{Kind: attest.RevokeKey, Key: attest.Digest{1}}, false},
		{attest.Revocation{Kind: attest.RevokePolicy, From: now.Unix(), Until: now.Unix()}, true},
		{attest.Revocation{Kind: attest.RevokePolicy, From: now.Unix() + 1, Until: now.Unix() + 2}, false},
		{attest.Revocation{Kind: attest.RevokePolicy, From: now.Unix() - 2, Until: now.Unix() - 1}, false},
		{attest.Revocation{Kind: attest.RevokeUser, User: "u", Devices: []attest.Digest{{9}, {1}}}, true},
		{attest.Revocation{Kind: attest.RevokeUser, User: "u"}, false},
		{attest.Revocation{Kind: attest.RevokeOrganization}, true},
		{attest.Revocation{Kind: "of a later release"}, true},
	} {
		var s attest.RevocationSet
		c.r.Revoked = true
		s.Apply(c.r)
		if _, got := s.Covers(h); got != c.want || c.r.Covers(h) != c.want {
			t.Errorf("%d: %+v: %v", i, c.r, got)
		}
		c.r.Revoked = false
		s.Apply(c.r)
		if _, got := s.Covers(h); got || len(s.List()) != 0 {
			t.Errorf("%d: %+v ended and still covers", i, c.r)
		}
	}
}
