package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"sekisho/attest"
	"sekisho/attest/store"
)

// asMember has the test's own program serve as one etcd of a cluster.
const asMember = "SEKISHO_TEST_ETCD"

// member is one etcd of a cluster on loopback.
type member struct {
	Name, Dir, Client, Peer, Cluster string

	cmd *exec.Cmd
}

func serveMember(text string) error {
	var m member
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		return err
	}
	client, err := url.Parse(m.Client)
	if err != nil {
		return err
	}
	peer, err := url.Parse(m.Peer)
	if err != nil {
		return err
	}
	c := embed.NewConfig()
	c.Name, c.Dir, c.InitialCluster, c.LogLevel = m.Name, m.Dir, m.Cluster, "error"
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	e, err := embed.StartEtcd(c)
	if err != nil {
		return err
	}
	return <-e.Err()
}

func freeURL(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "http://" + l.Addr().String()
}

// newCluster starts an etcd cluster of three processes.
func newCluster(t *testing.T) (members []*member, endpoints []string) {
	t.Helper()
	var initial []string
	for i := range 3 {
		m := &member{Name: fmt.Sprintf("m%d", i), Dir: t.TempDir(), Client: freeURL(t), Peer: freeURL(t)}
		members, endpoints = append(members, m), append(endpoints, m.Client)
		initial = append(initial, m.Name+"="+m.Peer)
	}
	for _, m := range members {
		m.Cluster = strings.Join(initial, ",")
		data, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		m.cmd = exec.Command(os.Args[0])
		m.cmd.Env = append(os.Environ(), asMember+"="+string(data))
		m.cmd.Stderr = os.Stderr
		if err := m.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(m.kill)
	}
	return members, endpoints
}

func (m *member) kill() {
	if m.cmd.ProcessState == nil {
		m.cmd.Process.Kill()
		m.cmd.Wait()
	}
}

// TestMoveToCluster moves a verifier from its embedded store to a real cluster
// of three etcd processes: devices, tickets, permits and used nonces are there,
// the old store is not used again, and it goes on without one of the members.
func TestMoveToCluster(t *testing.T) {
	b := newBench(t)
	d, id := b.enrolled()
	ticket := b.ticket(2)
	used := b.evidence(d, id, b.nonce(id))
	if r := b.attest(used).Result; r.Status != attest.StatusAffirming {
		t.Fatal(r.Reason)
	}
	before := b.stored()
	members, endpoints := newCluster(t)
	cluster, err := store.Open(t.Context(), store.Config{Endpoints: endpoints})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cluster.Close() })
	b.service.Close()
	if n, err := b.store.Move(t.Context(), cluster, "the cluster", b.now); err != nil || n < 4 {
		t.Fatal(n, err)
	}
	if s, err := NewService(t.Context(), b.service.Config); err == nil {
		s.Close()
		t.Error("the old store is used again")
	}
	if _, err := cluster.Move(t.Context(), b.store, "back", b.now); err == nil {
		t.Error("moved into a store that has moved")
	}
	c := b.service.Config
	c.Store, b.store = cluster, cluster
	b.use(c)
	if after := b.stored(); after != before {
		t.Errorf("moved:\n%s\nbefore:\n%s", after, before)
	}
	if r := b.attest(used).Result; r.Reason != attest.ReasonNonceReused {
		t.Errorf("evidence from before the move: %v", r.Reason)
	}
	second := b.second(name)
	alive := func(what string) {
		t.Helper()
		e := b.evidence(d, id, b.nonce(id))
		if r := ask(t, second, e); r.Status != attest.StatusAffirming {
			t.Errorf("%s: %v %s", what, r.Reason, r.Detail)
		}
		if r := b.attest(e).Result; r.Reason != attest.ReasonNonceReused {
			t.Errorf("%s: again with another verifier: %v", what, r.Reason)
		}
	}
	alive("on the cluster")
	if _, err := b.enrol(b.device(), ticket, nil); err != nil {
		t.Errorf("a ticket from before: %v", err)
	}
	members[0].kill()
	eventually(t, func() error { return cluster.Usable(t.Context()) })
	alive("without one member")
	if _, err := b.service.Retire(t.Context(), id, "lost"); err != nil {
		t.Error(err)
	}
	if r := ask(t, second, b.evidence(d, id, b.nonce(id))); r.Reason != attest.ReasonDeviceUnknown {
		t.Errorf("retired without one member: %v", r.Reason)
	}
	// Without a majority nobody is admitted.
	members[1].kill()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	other := b.evidence(d, id, b.nonce(id))
	data, err := other.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if r, err := b.service.Attest(ctx, data); err == nil && r.Chain != nil {
		t.Error("affirmed without a majority")
	}
}

// eventually waits until f succeeds.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	tick, limit := time.NewTicker(20*time.Millisecond), time.After(30*time.Second)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal(err)
		}
	}
}

// TestBackupAndRestore restores a backup into an empty store; a damaged one,
// and one into a store that has records, change nothing.
func TestBackupAndRestore(t *testing.T) {
	b := newBench(t)
	d, id := b.enrolled()
	b.attest(b.evidence(d, id, b.nonce(id)))
	before := b.stored()
	var backup bytes.Buffer
	if info, err := b.store.Backup(t.Context(), &backup, b.now); err != nil || info.Records < 4 {
		t.Fatal(info, err)
	}
	if _, err := b.store.Restore(t.Context(), bytes.NewReader(backup.Bytes())); err == nil || !strings.Contains(err.Error(), "only an empty one") {
		t.Errorf("over what is there: %v", err)
	}
	dir := filepath.Join(t.TempDir(), "new")
	fresh := openStore(t, dir)
	for name, data := range map[string][]byte{
		"cut":     backup.Bytes()[:backup.Len()-100],
		"flipped": bytes.Replace(backup.Bytes(), []byte(`"v":"`), []byte(`"v":"AAAA`), 1),
		"longer":  append(bytes.Clone(backup.Bytes()), "{}\n"...),
		"foreign": []byte("{}\n"),
		"empty":   nil,
	} {
		if _, err := fresh.Restore(t.Context(), bytes.NewReader(data)); err == nil {
			t.Errorf("%s: restored", name)
		}
	}
	// Interrupted: nobody uses the store, and it can be done again.
	if _, err := fresh.Restore(t.Context(), &interrupted{Reader: bytes.NewReader(backup.Bytes())}); err == nil {
		t.Error("an interrupted restore succeeded")
	}
	if err := fresh.Usable(t.Context()); err == nil {
		t.Error("half a store is used")
	}
	if _, err := fresh.Restore(t.Context(), bytes.NewReader(backup.Bytes())); err != nil {
		t.Fatal(err)
	}
	c := b.service.Config
	c.Store, b.store = fresh, fresh
	b.use(c)
	if after := b.stored(); after != before {
		t.Errorf("restored:\n%s\nbefore:\n%s", after, before)
	}
	if r := b.attest(b.evidence(d, id, b.nonce(id))).Result; r.Status != attest.StatusAffirming {
		t.Errorf("after the restore: %v", r.Reason)
	}
}

// interrupted is a backup whose second reading fails in its middle.
type interrupted struct {
	*bytes.Reader
	again bool
}

func (i *interrupted) Seek(offset int64, whence int) (int64, error) {
	i.again = true
	return i.Reader.Seek(offset, whence)
}

func (i *interrupted) Read(p []byte) (int, error) {
	if i.again && i.Len() < int(i.Size())/2 {
		return 0, errors.New("interrupted")
	}
	return i.Reader.Read(p[:min(len(p), 512)])
}

func FuzzReadBackup(f *testing.F) {
	f.Add([]byte(`{"format":"sekisho/backup/1","revision":1,"time":"2026-01-01T00:00:00Z"}` + "\n" + `{"k":"/sekisho/1/a","v":"AA=="}` + "\n" + `{"records":1,"sha256":""}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		store.ReadBackup(bytes.NewReader(data), func(string, []byte) error { return nil })
	})
}
