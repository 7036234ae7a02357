// Package store keeps the state of a fleet in etcd: a single member within
// this process by default, without any listener, or an external cluster. Both
// are used through the same client interface. On top of it are what a verifier
// needs beyond that: changes of many requests committed as one (Commit), and a
// copy of a prefix that follows all changes (Mirror).
package store

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
)

const (
	startTime = time.Minute      // for a member to open its data, replaying its log
	dialTime  = 10 * time.Second // to reach a cluster

	// quota bounds the data of the embedded member in bytes; beyond it, etcd
	// takes no more writes until something is removed.
	quota = 8 << 30

	// A record is rewritten with each attestation; its former versions serve
	// only watchers that lag.
	history = "1m"

	// A single member elects itself after one election timeout; nobody else
	// can disturb it.
	tick, election = 20 * time.Millisecond, 100 * time.Millisecond
)

// Config says where the state is: in Dir, or at Endpoints if there are any.
type Config struct {
	Dir       string      // of the embedded member
	Endpoints []string    // of an external cluster, such as https://192.0.2.1:2379
	TLS       *tls.Config // for the cluster; nil: none
	Log       *slog.Logger
}

// Store is an open store. It is safe for concurrent use.
type Store struct {
	client *clientv3.Client
	member *embed.Etcd // nil: external
	dir    string
	unlock func() // of dir

	commits chan *commit
	stop    context.CancelFunc
	wg      sync.WaitGroup
	once    sync.Once
}

// Open opens the store: it starts the embedded member, whose directory no
// other process may have open, or connects to the cluster. It returns when the
// store has answered.
func Open(ctx context.Context, c Config) (*Store, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{commits: make(chan *commit)}
	var err error
	if len(c.Endpoints) > 0 {
		s.client, err = connect(c)
	} else {
		err = s.embed(ctx, c)
	}
	if err == nil {
		err = s.answers(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("store: %w", err), s.close())
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	s.wg.Go(func() { s.commitLoop(run) })
	return s, nil
}

func connect(c Config) (*clientv3.Client, error) {
	for _, e := range c.Endpoints {
		if u, err := url.Parse(e); err != nil || u.Host == "" && u.Path == "" {
			return nil, fmt.Errorf("endpoint %.64q: want a URL such as https://192.0.2.1:2379", e)
		}
		if c.TLS == nil && !strings.HasPrefix(e, "http://127.") && !strings.HasPrefix(e, "unix:") {
			return nil, fmt.Errorf("endpoint %.64q: beyond loopback the cluster must be reached by TLS with a client certificate", e)
		}
	}
	return clientv3.New(clientv3.Config{
		Endpoints: c.Endpoints, TLS: c.TLS, DialTimeout: dialTime, Logger: zap.NewNop(),
		DialKeepAliveTime: dialTime, DialKeepAliveTimeout: dialTime / 2, RejectOldCluster: true,
	})
}

// embed starts the member. It listens nowhere: this process is its only
// client, and it has no peers. The URLs are names and no more.
func (s *Store) embed(ctx context.Context, c Config) error {
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return err
	}
	if err := room(c.Dir); err != nil {
		return err
	}
	var err error
	if s.unlock, err = lockDir(c.Dir); err != nil {
		return err
	}
	nowhere := url.URL{Scheme: "unix", Host: "embedded"}
	e := embed.NewConfig()
	e.Name, e.Dir = "embedded", c.Dir
	e.ListenClientUrls, e.ListenPeerUrls = nil, nil
	e.AdvertiseClientUrls, e.AdvertisePeerUrls = []url.URL{nowhere}, []url.URL{nowhere}
	e.InitialCluster = e.Name + "=" + nowhere.String()
	e.TickMs, e.ElectionMs = uint(tick.Milliseconds()), uint(election.Milliseconds())
	e.QuotaBackendBytes = quota
	e.AutoCompactionMode, e.AutoCompactionRetention = embed.CompactorModePeriodic, history
	e.MaxRequestBytes = maxRequest
	e.ZapLoggerBuilder = embed.NewZapLoggerBuilder(quiet(c.Log))
	if s.member, err = embed.StartEtcd(e); err != nil {
		s.member = nil
		return fmt.Errorf("%s: %w", c.Dir, err)
	}
	s.dir = c.Dir
	select {
	case <-s.member.Server.ReadyNotify():
	case <-s.member.Server.StopNotify():
		return fmt.Errorf("%s: the embedded etcd stopped", c.Dir)
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(startTime):
		return fmt.Errorf("%s: the embedded etcd is not ready after %s", c.Dir, startTime)
	}
	s.client = v3client.New(s.member.Server)
	return nil
}

// answers waits for a read that a majority has confirmed.
func (s *Store) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	if _, err := s.client.Get(ctx, "/"); err != nil {
		return fmt.Errorf("etcd does not answer: %w", err)
	}
	return nil
}

// Client is etcd's own client of the store.
func (s *Store) Client() *clientv3.Client { return s.client }

// Update runs f as one transaction: what it reads has not changed when what it
// writes is written, else it runs again. An error from f is returned as it is,
// and then nothing is stored. It returns the revision of the change, 0 if f
// wrote nothing.
func (s *Store) Update(ctx context.Context, f func(concurrency.STM) error) (int64, error) {
	if err := s.room(); err != nil {
		return 0, err
	}
	return s.transact(ctx, f)
}

// Read runs f, which only reads, on records as of one moment, also while the
// disk has no room for more.
func (s *Store) Read(ctx context.Context, f func(concurrency.STM) error) error {
	_, err := s.transact(ctx, f)
	return err
}

func (s *Store) transact(ctx context.Context, f func(concurrency.STM) error) (int64, error) {
	var own error
	var resp *clientv3.TxnResponse
	var err error
	for {
		resp, err = concurrency.NewSTM(s.client, func(t concurrency.STM) error {
			own = f(t)
			return own
		}, concurrency.WithAbortContext(ctx))
		// A member that lags behind the one asked before knows the revision soon.
		// Only reads fail so: nothing has been written.
		if own != nil || !errors.Is(rpctypes.Error(err), rpctypes.ErrFutureRev) {
			break
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("store: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
	if own != nil {
		return 0, own
	}
	if err != nil {
		return 0, fmt.Errorf("store: %w", err)
	}
	if len(resp.Responses) == 0 { // one for each write
		return 0, nil
	}
	return resp.Header.Revision, nil
}

// Close waits for what is under way and closes the store.
func (s *Store) Close() (err error) {
	s.once.Do(func() {
		s.stop()
		s.wg.Wait()
		err = s.close()
	})
	return err
}

func (s *Store) close() error {
	var err error
	if s.client != nil {
		// The in-process client says that its context was cancelled.
		if e := s.client.Close(); !errors.Is(e, context.Canceled) {
			err = e
		}
	}
	if s.member != nil {
		s.member.Close()
	}
	if s.unlock != nil {
		s.unlock()
	}
	return err
}
